// The low-rank term of nf4_lora_gemv_sm90.cu: a CTA's share of z, its exchange within the cluster,
// and lora_B.
#pragma once

#include "nf4_lora_gemv_plan.cuh"
#include "ptx_sm90.cuh"

namespace lowbit::cuda {
namespace {

struct Columns {
    int begin, end;
};

// This CTA's share of K.
__device__ __forceinline__ Columns z_columns(int K) {
    const int size = static_cast<int>(cluster_size());
    const int width = ((K + size - 1) / size + 7) & ~7;
    const int begin = min(static_cast<int>(cluster_rank()) * width, K);
    return {begin, min(K, begin + width)};
}

// 32 columns of x and of all rows of lora_A, 16 of them to a tile: lane 4 g + t holds columns 8
// t..8 t + 7 of rows g and g + 8. That is the operand of two products if their k runs in this order
// in both factors. Tiles behind the rank are zero.
template <int kRankTiles>
struct ZStep {
    uint4 x, low[kRankTiles], high[kRankTiles];
};

// That a warp loads at a time, as many as there are registers for.
template <int kRankTiles>
constexpr int kZSteps = kRankTiles == 1 ? 2 : 1;

template <typename T, int kRankTiles>
__device__ __forceinline__ void
load_z(ZStep<kRankTiles>& s, const LoraMatmulArgs& args, int k, int end) {
    const int g = threadIdx.x % kWarpSize / 4;
    k += threadIdx.x % 4 * 8;
    s.x = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < kRankTiles; i++)
        s.low[i] = s.high[i] = make_uint4(0, 0, 0, 0);
    if (k >= end)
        return;
    const T* a = static_cast<const T*>(args.lora_A) + k;
    s.x = *reinterpret_cast<const uint4*>(static_cast<const T*>(args.x) + k);
#pragma unroll
    for (int i = 0; i < kRankTiles; i++) {
        const int row = 16 * i + g, last = args.r - 1;
        if (i > 0 && 16 * i > last)
            continue;
        s.low[i] = *reinterpret_cast<const uint4*>(a + min(row, last) * args.w.K);
        s.high[i] = *reinterpret_cast<const uint4*>(a + min(row + 8, last) * args.w.K);
    }
}

// Partial sums over this CTA's columns, to every CTA of the cluster. `loaded` holds the first
// steps. All columns of the product are the same x; column 0 counts.
template <typename T, int kRankTiles>
__device__ __forceinline__ void send_z_parts(
    ZStep<kRankTiles> (&loaded)[kZSteps<kRankTiles>],
    const LoraMatmulArgs& args,
    Scratch& scratch) {
    constexpr int kSteps = kZSteps<kRankTiles>;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const Columns columns = z_columns(static_cast<int>(args.w.K));
    const int first_k = columns.begin + warp * 32;
    float c[kRankTiles][4] = {};
#pragma unroll 1
    for (int k = first_k; k < columns.end; k += kSteps * kWarps * 32) {
        if (k != first_k) {
#pragma unroll
            for (int i = 0; i < kSteps; i++)
                load_z<T>(loaded[i], args, k + i * kWarps * 32, columns.end);
        }
#pragma unroll
        for (const ZStep<kRankTiles>& s : loaded) {
#pragma unroll
            for (int i = 0; i < kRankTiles; i++) {
                const uint4 low = s.low[i], high = s.high[i];
                mma_16x8x16(c[i], {low.x, high.x, low.y, high.y}, s.x.x, s.x.y, T{});
                mma_16x8x16(c[i], {low.z, high.z, low.w, high.w}, s.x.z, s.x.w, T{});
            }
        }
    }
    if (lane % 4 == 0) {
#pragma unroll
        for (int i = 0; i < kRankTiles; i++) {
            scratch.z_warp[warp][16 * i + lane / 4] = c[i][0];
            scratch.z_warp[warp][16 * i + lane / 4 + 8] = c[i][2];
        }
    }
    if (warp != kWarps - 1) {  // the last warp has the least to do
        named_barrier_arrive(kZBarrier, kThreads);
        return;
    }
    named_barrier(kZBarrier, kThreads);
    const uint32_t size = cluster_size(), rank = cluster_rank();
    constexpr int kRounds = (16 * kRankTiles + kWarpSize - 1) / kWarpSize;
    float sums[kRounds] = {};
#pragma unroll
    for (int round = 0; round < kRounds; round++) {
        const int j = round * kWarpSize + lane;
#pragma unroll
        for (int i = 0; i < kWarps; i++)
            sums[round] += j < args.r ? scratch.z_warp[i][j] : 0;
    }
#pragma unroll
    for (int round = 0; round < kRounds; round++) {
        const int j = round * kWarpSize + lane;
        if (j >= args.r)
            continue;
#pragma unroll 1
        for (uint32_t peer = 0; peer < size; peer++)
            store_remote_async(
                in_cta(shared_address(&scratch.z_parts[rank][j]), peer), sums[round],
                in_cta(shared_address(&scratch.z_arrived), peer));
    }
}

// s_j z[j] for the lane's j = 2 lane and 2 lane + 1, zero from r on.
template <typename T>
__device__ __forceinline__ float2
scaled_z(const LoraMatmulArgs& args, const Plan& plan, const Scratch& scratch) {
    const int j = threadIdx.x % kWarpSize * 2;
    const bool has_first = j < args.r, has_second = j + 1 < args.r;
    float2 z = {0, 0};
    if (plan.exchange) {
        barrier_wait_cluster<0>(shared_address(&scratch.z_arrived));
        const uint32_t size = cluster_size();
#pragma unroll 1
        for (uint32_t i = 0; i < size; i++) {
            z.x += has_first ? scratch.z_parts[i][j] : 0;
            z.y += has_second ? scratch.z_parts[i][j + 1] : 0;
        }
        if (args.z_out != nullptr && blockIdx.x == 0 && threadIdx.x < kWarpSize) {
            T* out = static_cast<T*>(args.z_out);
            if (has_first)
                out[j] = from_float<T>(z.x);
            if (has_second)
                out[j + 1] = from_float<T>(z.y);
        }
    } else {
        const T* in = static_cast<const T*>(args.z_in);
        z.x = has_first ? to_float(in[j]) : 0;
        z.y = has_second ? to_float(in[j + 1]) : 0;
    }
    return {
        has_first ? z.x * scratch.z_scale[j] : 0, has_second ? z.y * scratch.z_scale[j + 1] : 0};
}

// Elements 2 lane and 2 lane + 1 of kRows rows of lora_B. Rows are 4-byte aligned if r is even.
__device__ __forceinline__ void
load_lora_b(uint32_t (&b)[kRows], bool wanted, const LoraMatmulArgs& args, uint32_t row) {
    const int j = threadIdx.x % kWarpSize * 2, r = args.r;
    const uint16_t* p = static_cast<const uint16_t*>(args.lora_B) + static_cast<uint64_t>(row) * r;
    if (r % 2 == 0) {
#pragma unroll
        for (int i = 0; i < kRows; i++)
            b[i] = 0, load_if(wanted && j < r, b[i], static_cast<const void*>(p + i * r + j));
    } else if (wanted) {
#pragma unroll
        for (int i = 0; i < kRows; i++) {
            const uint32_t first = j < r ? p[i * r + j] : 0;
            b[i] = j + 1 < r ? first | static_cast<uint32_t>(p[i * r + j + 1]) << 16 : first;
        }
    }
}

}  // namespace
}  // namespace lowbit::cuda
