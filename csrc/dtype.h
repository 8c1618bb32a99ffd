// Element types and integer arithmetic of both libraries. No torch, no CUDA.
#pragma once

#include <cstdint>

namespace lowbit {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Static: files built for different instruction sets must not share a copy (cpu/isa.h).
static inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

}  // namespace lowbit
