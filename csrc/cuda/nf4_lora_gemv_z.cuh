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

// 32 columns of 16 rows of lora_A and of x: lane 4 g + t holds columns 8 t..8 t + 7 of rows g and
// g + 8. That is the operand of two products if their k runs in this order in both factors.
struct ZStep {
    uint4 x, low, high;
};

template <typename T>
__device__ __forceinline__ void
load_z(ZStep& s, const LoraMatmulArgs& args, int first_row, int k, int end) {
    const int g = threadIdx.x % kWarpSize / 4;
    k += threadIdx.x % 4 * 8;
    s.x = s.low = s.high = make_uint4(0, 0, 0, 0);
    if (k >= end)
        return;
    const T* a = static_cast<const T*>(args.lora_A) + k;
    s.x = *reinterpret_cast<const uint4*>(static_cast<const T*>(args.x) + k);
    s.low = *reinterpret_cast<const uint4*>(a + min(first_row + g, args.r - 1) * args.w.K);
    s.high = *reinterpret_cast<const uint4*>(a + min(first_row + g + 8, args.r - 1) * args.w.K);
}

// Partial sums over this CTA's columns, to every CTA of the cluster. `loaded` holds the first two
// steps. All columns of the product are the same x; column 0 counts.
template <typename T>
__device__ __forceinline__ void
send_z_parts(ZStep (&loaded)[2], const LoraMatmulArgs& args, Scratch& scratch) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const Columns columns = z_columns(static_cast<int>(args.w.K));
    const int first_k = columns.begin + warp * 32;
#pragma unroll 1
    for (int row = 0; row < args.r; row += 16) {
        float c[4] = {0, 0, 0, 0};
#pragma unroll 1
        for (int k = first_k; k < columns.end; k += kWarps * 64) {
            if (row > 0 || k != first_k) {
                load_z<T>(loaded[0], args, row, k, columns.end);
                load_z<T>(loaded[1], args, row, k + kWarps * 32, columns.end);
            }
#pragma unroll
            for (const ZStep& s : loaded) {
                mma_16x8x16(c, {s.low.x, s.high.x, s.low.y, s.high.y}, s.x.x, s.x.y, T{});
                mma_16x8x16(c, {s.low.z, s.high.z, s.low.w, s.high.w}, s.x.z, s.x.w, T{});
            }
        }
        if (lane % 4 == 0) {
            scratch.z_warp[warp][row + lane / 4] = c[0];
            scratch.z_warp[warp][row + lane / 4 + 8] = c[2];
        }
    }
    if (warp != kWarps - 1) {  // the last warp has the least to do
        named_barrier_arrive(kZBarrier, kThreads);
        return;
    }
    named_barrier(kZBarrier, kThreads);
    const uint32_t size = cluster_size(), rank = cluster_rank();
#pragma unroll 1
    for (int j = lane; j < args.r; j += kWarpSize) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kWarps; i++)
            sum += scratch.z_warp[i][j];
#pragma unroll 1
        for (uint32_t peer = 0; peer < size; peer++)
            store_remote_async(
                in_cta(shared_address(&scratch.z_parts[rank][j]), peer), sum,
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
