// The parts of nf4_lora_gemv.cu, which says how they fit together: x and z, the weight's rows, and
// what surrounds the main loop.
#pragma once

#include "common.cuh"
#include "nf4_lora_matmul.h"
#include "ptx_sm90.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kRows = 4;             // that share a warp's x in registers
constexpr int kColumnsPerLane = 32;  // 16 bytes of codes, never more than one block
constexpr int kStep = kColumnsPerLane * kWarpSize;
constexpr int kTableBytes = 256 * 256;
constexpr int kMaxRank = 64;
constexpr int kMaxCluster = 8;
constexpr int kXUnit = 16;      // columns a thread stages at a time
constexpr int kXUnits = 4;      // times, all loaded before any is stored
constexpr int kXExponent = 10;  // |x| < 2^11, |codebook| < 2: 8 products stay below 2^15
constexpr int64_t kMaxColumns = kXUnits * kXUnit * kThreads;
constexpr int kMaxSharedBytes = 227 * 1024;

// Of CTA i: groups_each groups, one more if i < groups_extra.
struct Plan {
    uint32_t groups_each, groups_extra;
    uint32_t steps;          // per group: K / 1024, rounded up
    uint32_t most_groups;    // of a CTA
    uint32_t scratch_bytes;  // offset of Scratch
    bool exchange;           // z is computed here
};

// Shared memory: the table, x as fp16 (2 KiB per step), Scratch, partial sums of
// most_groups + kWarps groups, nested_absmax of the CTA's rows; 128 KiB for K = 28672, N = 8192.
struct Scratch {
    float absmax_codebook[256];
    float z_warp[kWarps][kMaxRank];        // this CTA's columns, by warp
    float z_parts[kMaxCluster][kMaxRank];  // by CTA of the cluster
    float z_scale[kMaxRank];
    uint64_t z_arrived;
    uint32_t x_max[kWarps];
    float sums[1];  // and on: see below
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ __forceinline__ __half2 as_half2(uint32_t pair) {
    return *reinterpret_cast<const __half2*>(&pair);
}

__device__ __forceinline__ float power_of_two(int exponent) {
    return __uint_as_float(static_cast<uint32_t>(exponent + 127) << 23);
}

// Of |v|, within what power_of_two and its inverse can express whatever v is.
__device__ __forceinline__ int exponent_of(float v) {
    return min(max(static_cast<int>(__float_as_uint(v) >> 23 & 255) - 127, -100), 100);
}

// ---- x ------------------------------------------------------------------------------------------

// Thread t's unit b: half t / 32 % 2 of lane t % 32's columns, so that 8 neighbours store 128
// bytes.
__device__ __forceinline__ uint32_t x_column(int b) {
    const uint32_t t = threadIdx.x;
    return b * kXUnit * kThreads + t / 64 * kStep + t % 32 * kColumnsPerLane + t / 32 % 2 * kXUnit;
}

template <typename T>
__device__ __forceinline__ void load_x(uint4 (&v)[2], const LoraMatmulArgs& args, uint32_t k) {
    v[0] = v[1] = make_uint4(0, 0, 0, 0);
    if (k >= args.w.K)
        return;
    const uint4* p = reinterpret_cast<const uint4*>(static_cast<const T*>(args.x) + k);
    v[0] = p[0], v[1] = p[1];
}

__device__ __forceinline__ uint32_t max_magnitude(const uint4& v, uint32_t seen) {
    seen = __vmaxu2(seen, __vmaxu2(v.x & 0x7fff7fffu, v.y & 0x7fff7fffu));
    return __vmaxu2(seen, __vmaxu2(v.z & 0x7fff7fffu, v.w & 0x7fff7fffu));
}

// The 8 columns that meet word i of lane l's codes lie at 2048 * step + 512 * i + 16 * l.
template <typename T>
__device__ __forceinline__ void
store_x(unsigned char* smem_x, const uint4 (&v)[2], uint32_t k, float scale) {
    unsigned char* to = smem_x + k / kStep * (2 * kStep) + k / 16 % 2 * 1024 + k / 32 % 32 * 16;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t in[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
        uint32_t out[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 pair = unpack_pair(in[j], T{});
            out[j] = cvt_f16x2(pair.x * scale, pair.y * scale);
        }
        *reinterpret_cast<uint4*>(to + i * 512) = make_uint4(out[0], out[1], out[2], out[3]);
    }
}

// ---- z ------------------------------------------------------------------------------------------

__device__ __forceinline__ void mma_16x8x16(
    float (&c)[4],
    uint32_t a0,
    uint32_t a1,
    uint32_t a2,
    uint32_t a3,
    uint32_t b0,
    uint32_t b1,
    __nv_bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_16x8x16(
    float (&c)[4],
    uint32_t a0,
    uint32_t a1,
    uint32_t a2,
    uint32_t a3,
    uint32_t b0,
    uint32_t b1,
    __half) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

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
                mma_16x8x16(c, s.low.x, s.high.x, s.low.y, s.high.y, s.x.x, s.x.y, T{});
                mma_16x8x16(c, s.low.z, s.high.z, s.low.w, s.high.w, s.x.z, s.x.w, T{});
            }
        }
        if (lane % 4 == 0) {
            scratch.z_warp[warp][row + lane / 4] = c[0];
            scratch.z_warp[warp][row + lane / 4 + 8] = c[2];
        }
    }
    if (warp != kWarps - 1) {  // the last warp has the least to do
        asm volatile("barrier.cta.arrive.aligned 1, %0;" ::"n"(kThreads) : "memory");
        return;
    }
    asm volatile("barrier.cta.sync.aligned 1, %0;" ::"n"(kThreads) : "memory");
    const uint32_t size = cluster_size(), rank = cluster_rank();
#pragma unroll 1
    for (int j = lane; j < args.r; j += kWarpSize) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kWarps; i++)
            sum += scratch.z_warp[i][j];
#pragma unroll 1
        for (uint32_t peer = 0; peer < size; peer++)
            send(&scratch.z_parts[rank][j], &scratch.z_arrived, peer, sum);
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
        wait_for_bytes(&scratch.z_arrived);
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

// ---- weight -------------------------------------------------------------------------------------

struct Rows {
    uint4 codes[kRows];
    uint32_t scale[kRows];  // absmax, or its 8-bit code
};

// `element` is that of row 0; the others follow at a distance of K.
template <bool kNested>
__device__ __forceinline__ void
load_row(Rows& rows, int i, bool wanted, const WeightView& w, uint32_t element) {
    element += i * static_cast<uint32_t>(w.K);
    const uint32_t block = element >> w.blocksize_log2;
    load_if(wanted, rows.codes[i], w.qweight + (element >> 1));
    if constexpr (kNested)
        load_if(wanted, rows.scale[i], w.absmax_8bit + block);
    else
        load_if(wanted, rows.scale[i], static_cast<const void*>(w.absmax + block));
}

// 32 weights of a row times x: two runs of 8 pairs are added up in fp16. A longer run would lose
// accuracy, a shorter one spends more conversions.
__device__ __forceinline__ float
dot(const unsigned char* table, const uint4& codes, const uint4 (&x)[4]) {
    const uint32_t lane_offset = threadIdx.x % kWarpSize * 4;
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
    float sum = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        __half2 run;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint4& eight = x[2 * half + i / 4];
            const uint32_t columns[4] = {eight.x, eight.y, eight.z, eight.w};
            const __half2 factor = as_half2(columns[i % 4]);
            // Byte 1 of the address is the code pair, byte 0 the lane.
            const uint32_t at = prmt(words[2 * half + i / 4], lane_offset, 0x7604u | i % 4 << 4);
            const __half2 pair = as_half2(*reinterpret_cast<const uint32_t*>(table + at));
            run = i == 0 ? __hmul2(pair, factor) : __hfma2(pair, factor, run);
        }
        sum += __low2float(run) + __high2float(run);
    }
    return sum;
}

// Sums over the warp; lane 8 i ends up with row i. Halving the rows held with each exchange takes
// 6 shuffles where one row after the other takes 20.
__device__ __forceinline__ float sum_rows(float (&sums)[kRows]) {
    const uint32_t lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int rows = kRows / 2, step = kWarpSize / 2; rows > 0; rows /= 2, step /= 2) {
        const bool upper = lane & step;
#pragma unroll
        for (int i = 0; i < rows; i++) {
            const float keep = upper ? sums[i + rows] : sums[i];
            const float give = upper ? sums[i] : sums[i + rows];
            sums[i] = keep + __shfl_xor_sync(kFullWarp, give, step);
        }
    }
    float sum = sums[0];
#pragma unroll
    for (int step = kWarpSize / kRows / 2; step > 0; step /= 2)
        sum += __shfl_xor_sync(kFullWarp, sum, step);
    return sum;
}

// What a CTA knows about its part of the weight.
struct Share {
    uint32_t first_group, groups, first_row, rows;
    uint32_t steps;        // of all its groups
    uint32_t each, extra;  // warp i takes `each` steps, one more if i < extra

    __device__ __forceinline__ Share(const Plan& plan, uint32_t N) {
        const uint32_t cta = blockIdx.x;
        first_group = cta * plan.groups_each + min(cta, plan.groups_extra);
        groups = plan.groups_each + (cta < plan.groups_extra);
        first_row = row_of(0, N);
        rows = min((first_group + groups) * kRows, N) - first_row;
        steps = groups * plan.steps;
        each = steps / kWarps, extra = steps % kWarps;
    }

    // The last group of the weight is moved back to end with row N - 1; it computes rows of the
    // group before it again, and store_y drops them: their sums may be split differently.
    __device__ __forceinline__ uint32_t row_of(uint32_t group, uint32_t N) const {
        return min((first_group + group) * kRows, N - kRows);
    }

    __device__ __forceinline__ uint32_t warp_of(uint32_t step) const {
        const uint32_t longer = extra * (each + 1);
        return step < longer ? step / (each + 1) : extra + (step - longer) / each;
    }
};

// What this warp reads first, and small operands of the CTA. Single lanes with few requests: the
// bulk engine takes about 30 ns for each, and a queue of weights would hold up lora_A.
template <typename T, bool kNested>
__device__ __forceinline__ void prefetch_inputs(
    const LoraMatmulArgs& args,
    const Plan& plan,
    const Share& share,
    uint32_t row,
    uint32_t step,
    bool has_steps) {
    const WeightView& w = args.w;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    if (warp == 1 && lane == 16)
        prefetch_l2(w.codebook);
    if (kNested && warp == 1 && lane == 17)
        prefetch_l2(w.nested_offset);
    if (kNested && warp == 1 && lane < 8)
        prefetch_l2(w.nested_codebook + lane * 32);
    if (lane != 0)
        return;
    if (plan.exchange) {
        const Columns columns = z_columns(static_cast<int>(w.K));
        const T* a = static_cast<const T*>(args.lora_A) + columns.begin;
#pragma unroll 1
        for (int j = warp; j < args.r; j += kWarps)
            prefetch_l2(a + j * w.K, sizeof(T) * (columns.end - columns.begin));
    }
    if (kNested && warp == 0 && share.rows > 0) {
        const int shift = w.blocksize_log2 + w.nested_blocksize_log2;
        const int64_t first = (share.first_row * w.K) >> shift;
        const int64_t last = ((share.first_row + share.rows) * w.K - 1) >> shift;
        prefetch_l2(w.nested_absmax + first, sizeof(float) * (last - first + 1));
    }
    if (has_steps) {
        const uint64_t block = (row * w.K) >> w.blocksize_log2;
        const uint64_t blocks = (kRows * w.K) >> w.blocksize_log2;
        if (kNested)
            prefetch_l2(w.absmax_8bit + block, blocks);
        else
            prefetch_l2(w.absmax + block, sizeof(float) * blocks);
    }
    if (args.r > 0 && warp == 2) {
        const T* b = static_cast<const T*>(args.lora_B);
        prefetch_l2(
            b + static_cast<int64_t>(share.first_row) * args.r, sizeof(T) * share.rows * args.r);
    }
    if (args.bias != nullptr && warp == 3)
        prefetch_l2(static_cast<const T*>(args.bias) + share.first_row, sizeof(T) * share.rows);
    if (has_steps) {
        const int64_t row_bytes = w.K / 2, at = step * (kStep / 2);
#pragma unroll
        for (int i = 0; i < kRows; i++)
            prefetch_l2(
                w.qweight + (row + i) * row_bytes + at, min(int64_t{kStep / 2}, row_bytes - at));
    }
}

// Adds the warps' sums of each row and the bias.
template <typename T>
__device__ __forceinline__ void
store_y(const LoraMatmulArgs& args, const Plan& plan, const Share& share, const float* sums) {
    for (uint32_t i = threadIdx.x; i < share.groups * kRows; i += kThreads) {
        const uint32_t group = i / kRows;
        const uint32_t row = share.row_of(group, static_cast<uint32_t>(args.w.N)) + i % kRows;
        if (row < (share.first_group + group) * kRows)
            continue;  // stored by the group before
        const uint32_t first = share.warp_of(group * plan.steps);
        const uint32_t last = share.warp_of((group + 1) * plan.steps - 1);
        float y = 0;
#pragma unroll 1
        for (uint32_t warp = first; warp <= last; warp++)
            y += sums[warp * kRows + i];
        if (args.bias != nullptr)
            y += to_float(static_cast<const T*>(args.bias)[row]);
        static_cast<T*>(args.y)[row] = from_float<T>(y);
    }
}

// ---- small operands -----------------------------------------------------------------------------

// All that is read before the first product, loaded in one batch: a store between the loads would
// wait for its own and hold up the rest.
struct Operands {
    float first_value, second_value;  // of table entry threadIdx.x % 256
    float offset, absmax_value, nested_value, z_scale;
    uint32_t nested_first, nested_count;  // of nested_absmax, for the rows of the CTA
    uint4 x[kXUnits][2];
    ZStep z[2];
};

template <typename T, bool kNested>
__device__ __forceinline__ void
load_operands(Operands& o, const LoraMatmulArgs& args, const Plan& plan, const Share& share) {
    const WeightView& w = args.w;
    const int tid = threadIdx.x, warp = tid / kWarpSize;
    o.first_value = w.codebook[tid / 16 % 16], o.second_value = w.codebook[tid % 16];
    o.offset = o.absmax_value = o.nested_value = 0;
    o.nested_first = o.nested_count = 0;
    if (kNested) {
        const int shift = w.blocksize_log2 + w.nested_blocksize_log2;
        const int64_t end = (share.first_row + share.rows) * w.K - 1;
        o.nested_first = static_cast<uint32_t>((share.first_row * w.K) >> shift);
        if (share.rows > 0)
            o.nested_count = static_cast<uint32_t>(end >> shift) - o.nested_first + 1;
        o.offset = *w.nested_offset;
        if (tid < 256)
            o.absmax_value = w.nested_codebook[tid];
        if (tid < o.nested_count)
            o.nested_value = w.nested_absmax[o.nested_first + tid];
    }
    o.z_scale = args.scaling;
    if (args.lora_scaling != nullptr && tid < args.r)
        o.z_scale *= args.lora_scaling[tid];
#pragma unroll
    for (int b = 0; b < kXUnits; b++)
        load_x<T>(o.x[b], args, x_column(b));
    if (!plan.exchange)
        return;
    const Columns columns = z_columns(static_cast<int>(w.K));
#pragma unroll
    for (int i = 0; i < 2; i++)
        load_z<T>(o.z[i], args, 0, columns.begin + (warp + i * kWarps) * 32, columns.end);
}

// Builds the table and everything else in shared memory. Returns the factor that undoes the powers
// of two in it. Two CTA barriers.
template <typename T, bool kNested>
__device__ __forceinline__ float store_operands(
    const Operands& o,
    const LoraMatmulArgs& args,
    const Plan& plan,
    unsigned char* table,
    Scratch& scratch,
    float* nested) {
    const int tid = threadIdx.x, lane = tid % kWarpSize, warp = tid / kWarpSize;
    // Each warp has all 16 values. Thread t writes half of pair t % 256's copies; lanes start at
    // different ones, since the pairs of 8 neighbours share banks.
    const uint32_t magnitude = __float_as_uint(o.second_value) & 0x7fffffffu;
    const int value_exponent =
        exponent_of(__uint_as_float(__reduce_max_sync(kFullWarp, magnitude)));
    const float value_scale = power_of_two(-value_exponent);
    const uint32_t pair = cvt_f16x2(o.first_value * value_scale, o.second_value * value_scale);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int copy = (tid / 256 * 4 + i + tid) % 8;
        *reinterpret_cast<uint4*>(table + tid % 256 * 256 + copy * 16) =
            make_uint4(pair, pair, pair, pair);
    }
    if (kNested && tid < 256)
        scratch.absmax_codebook[tid] = o.absmax_value;
    if (tid < o.nested_count)
        nested[tid] = o.nested_value;
    if (tid < args.r)
        scratch.z_scale[tid] = o.z_scale;
#pragma unroll 1
    for (uint32_t i = tid + kThreads; i < o.nested_count; i += kThreads)
        nested[i] = args.w.nested_absmax[o.nested_first + i];

    uint32_t x_max = 0;
#pragma unroll
    for (int b = 0; b < kXUnits; b++)
        x_max = max_magnitude(o.x[b][0], max_magnitude(o.x[b][1], x_max));
    x_max = __reduce_max_sync(kFullWarp, max(x_max >> 16, x_max & 0xffffu));
    if (lane == 0)
        scratch.x_max[warp] = x_max;
    __syncthreads();
    x_max = __reduce_max_sync(kFullWarp, scratch.x_max[lane % kWarps]);
    const int x_exponent = exponent_of(unpack_pair(x_max, T{}).x) - kXExponent;
#pragma unroll
    for (int b = 0; b < kXUnits; b++) {
        if (x_column(b) < plan.steps * kStep)
            store_x<T>(table + kTableBytes, o.x[b], x_column(b), power_of_two(-x_exponent));
    }
    __syncthreads();
    return power_of_two(x_exponent) * power_of_two(value_exponent);
}

#endif

}  // namespace
}  // namespace lowbit::cuda
