// A CTA's run of vectors on the way from weight to codes and scales. Device code of
// nf4_quantize.cu.
//
// A thread takes kUnroll vectors of 8 elements per step, fetched kStages steps ahead into shared
// memory; a block is a group of neighbouring lanes. No barrier between the warps.
#pragma once

#include "code_table.cuh"
#include "elements.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kUnroll = 2;  // vectors of 8 elements per thread and step

// What reciprocal() gives, for several at once: one test finds the values beyond the range in which
// a Newton step makes the hardware's estimate exact, where __frcp_rn has a test and a call for
// each.
template <int kCount>
__device__ __forceinline__ void reciprocals(float (&absmax)[kCount], float (&inverse)[kCount]) {
    float low = absmax[0], high = absmax[0];
#pragma unroll
    for (int u = 0; u < kCount; u++) {
        const float estimate = rcp_approx(absmax[u]);
        inverse[u] = __fmaf_rn(-__fmaf_rn(absmax[u], estimate, -1.0f), estimate, estimate);
        if (u > 0) {
            low = fminf(low, absmax[u]);
            high = max_nan(high, absmax[u]);
        }
    }
    if (low >= 0x1p-126f && high < 0x1p126f)
        return;
#pragma unroll
    for (int u = 0; u < kCount; u++) {
        absmax[u] = max_nan(absmax[u], absmax[u]);  // one NaN for all types
        inverse[u] = reciprocal(absmax[u]);
    }
}

// Block maxima, each over a group of kLanes lanes. Two of a 16-bit type share a word on the way.
template <int kLanes, typename T>
__device__ __forceinline__ void
group_absmax(const Elements<T, 8> (&from)[kUnroll], float (&absmax)[kUnroll]) {
    if constexpr (sizeof(T) == 2) {
        static_assert(kUnroll == 2);
        const uint32_t a = from[0].absmax_pair(), b = from[1].absmax_pair();
        uint32_t m = max_nan_pair(prmt(a, b, 0x5410), prmt(a, b, 0x7632), T{});
#pragma unroll
        for (int step = 1; step < kLanes; step *= 2)
            m = max_nan_pair(m, __shfl_xor_sync(kFullWarp, m, step), T{});
        const float2 v = unpack_pair(m, T{});
        absmax[0] = v.x, absmax[1] = v.y;
    } else {
#pragma unroll
        for (int u = 0; u < kUnroll; u++)
            absmax[u] = group_max(from[u].absmax(), kLanes);
    }
}

// What a thread has under way: kStages steps of kUnroll vectors in slots of shared memory that only
// this thread writes and reads, so no barrier is needed.
template <typename T, int kThreads>
struct Ring {
    static constexpr int kStages = 2;
    static constexpr int kWords = Elements<T, 8>::kWords;
    static constexpr int kPieces = kUnroll * kWords / 4;
    static constexpr size_t kBytes = size_t{16} * kStages * kPieces * kThreads;
    uint4 slot[kStages][kPieces][kThreads];

    __device__ __forceinline__ void fetch(int stage, const T* source) {
#pragma unroll
        for (int u = 0; u < kUnroll; u++) {
#pragma unroll
            for (int i = 0; i < kWords / 4; i++)
                copy_async_16(
                    shared_address(&slot[stage][u * kWords / 4 + i][threadIdx.x]),
                    reinterpret_cast<const uint4*>(source + u * kThreads * 8) + i);
        }
    }

    __device__ __forceinline__ void read(int stage, Elements<T, 8> (&to)[kUnroll]) const {
#pragma unroll
        for (int u = 0; u < kUnroll; u++) {
#pragma unroll
            for (int i = 0; i < kWords; i += 4) {
                const uint4 v = slot[stage][u * kWords / 4 + i / 4][threadIdx.x];
                to[u].word[i] = v.x, to[u].word[i + 1] = v.y;
                to[u].word[i + 2] = v.z, to[u].word[i + 3] = v.w;
            }
        }
    }
};

// A CTA's run. Pointers are the thread's own and move with it.
template <typename T, int kLanes, int kThreads>
struct Run {
    using Slots = Ring<T, kThreads>;
    static constexpr int kStep = kUnroll * kThreads;

    const T* source;
    uint32_t* target;
    float* scales;
    uint32_t count;  // vectors of the CTA left

    // Beyond the end the last vector comes again: it cannot change the maximum of its block.
    __device__ __forceinline__ void load_rest(Elements<T, 8> (&to)[kUnroll]) const {
        const T* first = source - static_cast<int64_t>(threadIdx.x) * 8;
#pragma unroll
        for (int u = 0; u < kUnroll; u++)
            to[u].load(first + min(u * kThreads + threadIdx.x, count - 1) * 8, 8);
    }

    template <bool kFast, bool kRest>
    __device__ __forceinline__ void
    quantize(const Elements<T, 8> (&from)[kUnroll], const CodeTable& table, uint32_t cells) {
        float absmax[kUnroll], inverse[kUnroll];
        group_absmax<kLanes>(from, absmax);
        reciprocals(absmax, inverse);
#pragma unroll
        for (int u = 0; u < kUnroll; u++) {
            float x[8];
            scale_elements(from[u], inverse[u], x);
            const uint32_t codes =
                encode(table, cells, kFast || table.one_per_cell, kFast || table.ordered, x);
            if (kRest && u * kThreads + threadIdx.x >= count)
                continue;
            target[u * kThreads] = codes;
            if (threadIdx.x % kLanes == 0)
                scales[u * (kThreads / kLanes)] = absmax[u];
        }
        target += kStep;
        scales += kStep / kLanes;
    }

    __device__ __forceinline__ void start(Slots& ring) {
        const uint32_t steps = count / kStep;
#pragma unroll
        for (int s = 0; s < Slots::kStages; s++) {
            if (s < steps)
                ring.fetch(s, source + s * (kStep * 8));
            commit_async();
        }
    }

    // Branches are the same for the whole CTA, so shuffles need no convergence check.
    template <bool kFast>
    __device__ __forceinline__ void quantize_all(Slots& ring, const CodeTable& table) {
        const uint32_t cells = cells_of(table);
        constexpr int kStages = Slots::kStages;
        const uint32_t steps = count / kStep;
        count %= kStep;
        int stage = 0;
#pragma unroll 1
        for (uint32_t step = 0; step < steps; step++) {
            Elements<T, 8> now[kUnroll];
            wait_async<kStages - 1>();
            ring.read(stage, now);
            if (step + kStages < steps)
                ring.fetch(stage, source + kStages * (kStep * 8));
            commit_async();
            source += kStep * 8;
            stage = stage + 1 == kStages ? 0 : stage + 1;
            quantize<kFast, false>(now, table, cells);
        }
        if (count > 0) {
            Elements<T, 8> now[kUnroll];
            load_rest(now);
            quantize<kFast, true>(now, table, cells);
        }
    }
};

}  // namespace
}  // namespace lowbit::cuda
