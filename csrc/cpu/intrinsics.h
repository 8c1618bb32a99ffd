// <immintrin.h> without a false alarm: GCC before 13 warns that the AVX-512 intrinsics read the
// register they deliberately leave undefined (-Wmaybe-uninitialized,
// https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593). Include this instead.
#pragma once

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
