// Instruction-set levels of the CPU backend, chosen at run time.
//
// Levels are a chain, each one implies all before it:
//     generic < avx2 (+ FMA, F16C) < avx512 (F, BW, DQ, VL) < avx512_bf16 < amx (tile + bf16)
// A level counts as available when the processor reports it, the operating system saves its
// registers (XCR0; for amx the kernel must also grant the tile state, see isa.cpp), and the
// environment variable LOWBIT_CPU_ISA does not cap it lower.
//
// How a kernel uses it: one plain source holds the portable code and the dispatch, `*_avx2.cpp` and
// `*_avx512.cpp` hold the same kernel built with the flags of that level (CMakeLists.txt sets them
// by file name):
//
//     void launch_thing(const Thing& args) {
//     #if LOWBIT_CPU_X86
//         if (current_isa() >= Isa::kAvx512) return thing_avx512(args);
//         if (current_isa() >= Isa::kAvx2) return thing_avx2(args);
//     #endif
//         thing_generic(args);
//     }
//
// Rule for every header that such a file includes: no function with external or weak linkage
// (everything `static`, in an anonymous namespace, or always inlined), and no torch header. The
// linker keeps one copy of a weak function for the whole library, and if that is the copy built for
// AVX-512 the library crashes on the machines the generic level exists for.
#pragma once

#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#define LOWBIT_CPU_X86 1
#else
#define LOWBIT_CPU_X86 0
#endif

#if defined(__GNUC__)
#define LOWBIT_INLINE inline __attribute__((always_inline))
#else
#define LOWBIT_INLINE inline
#endif

namespace lowbit::cpu {

enum class Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

// The level kernels must use now. Cheap (one relaxed atomic load); read it once per operator call,
// not per row. Throws std::runtime_error when LOWBIT_CPU_ISA holds an unknown name.
Isa current_isa();

// The highest level that set_isa accepts: the machine's, capped by LOWBIT_CPU_ISA.
Isa max_isa();

const char* isa_name(Isa isa);

// Selects a level for the whole process. Throws std::runtime_error for an unknown or unavailable
// name.
void set_isa(const std::string& name);

}  // namespace lowbit::cpu
