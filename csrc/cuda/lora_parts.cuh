// Partial sums of the gradients of low-rank factors, added up in their order.
#pragma once

#include "common.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kPartLoads = 16;  // under way at a time

// Four neighbouring sums over the parts, `stride` floats apart.
template <int kLoads = kPartLoads>
__device__ __forceinline__ float4 add_parts(const float* first, int parts, int64_t stride) {
    float4 sum{};
    for (int base = 0; base < parts; base += kLoads) {
        float4 v[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; i++)
            v[i] = base + i < parts ? *reinterpret_cast<const float4*>(first + (base + i) * stride)
                                    : float4{};
#pragma unroll
        for (int i = 0; i < kLoads; i++)
            sum.x += v[i].x, sum.y += v[i].y, sum.z += v[i].z, sum.w += v[i].w;
    }
    return sum;
}

}  // namespace
}  // namespace lowbit::cuda
