// A sum over all CTAs of a cooperative launch that is a grid barrier at the same time. Device code
// of nf4_quantize.cu.
//
// Each CTA leaves its sum in a word of its own, and one warp of every CTA reads all words until
// none is missing: one trip through L2 after the last arrival, where a barrier and a sum behind it
// take three (store and count, see the count, read the sums). Sums are not negative, so a negative
// word is one that has not come. The words are made so when the kernel starts, for the workspace
// may hold anything and a graph may replay the launch; that no CTA reads a word of before is what
// an ordinary grid barrier is for, arrived at in the beginning and long passed in the end.
#pragma once

#include <cooperative_groups.h>

#include <utility>

#include "common.cuh"

namespace lowbit::cuda {

class GridSum {
public:
    // Both by the whole CTA, with a barrier of the CTA each and the kernel's work in between.
    __device__ __forceinline__ void open(double* words) {
        words_ = words;
        if (threadIdx.x == 0)
            words_[blockIdx.x] = -1.0;
        token_ = cooperative_groups::this_grid().barrier_arrive();
    }

    __device__ __forceinline__ void wait_open() {
        cooperative_groups::this_grid().barrier_wait(std::move(token_));
    }

    // By one thread; sum >= 0 or NaN. kMemory: what the CTA wrote to memory comes with it.
    template <bool kMemory>
    __device__ __forceinline__ void publish(double sum) const {
        if (kMemory)
            __threadfence();
        store_relaxed(words_ + blockIdx.x, sum);
    }

    // By one warp: the sum of all CTAs in an order fixed by the grid, in every lane.
    template <bool kMemory>
    __device__ __forceinline__ double collect() const {
        const uint32_t last = gridDim.x - 1;
        double sum = 0.0;
        for (uint32_t first = threadIdx.x % kWarpSize; first <= last; first += kBatch * kWarpSize) {
            double word[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; i++)
                word[i] = -1.0;
            bool missing;
            do {
                missing = false;
#pragma unroll
                for (int i = 0; i < kBatch; i++) {
                    if (word[i] < 0.0)
                        word[i] = load_relaxed(words_ + min(first + i * kWarpSize, last));
                }
#pragma unroll
                for (int i = 0; i < kBatch; i++)
                    missing = missing || word[i] < 0.0;
            } while (missing);
#pragma unroll
            for (int i = 0; i < kBatch; i++) {
                if (first + i * kWarpSize <= last)
                    sum += word[i];
            }
        }
        if (kMemory)
            __threadfence();
        return warp_sum(sum);
    }

private:
    static constexpr int kBatch = 9;  // words of a lane: 288 CTAs, two per SM of an H100 and more
    double* words_;
    unsigned token_;
};

}  // namespace lowbit::cuda
