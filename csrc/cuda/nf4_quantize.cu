// Blockwise 4-bit quantization of a weight and, in the same launch, 8-bit quantization of its
// scales.
//
//     absmax = max |w| over a block;  x = RN(w * RN(1 / max(absmax, 1e-38)))
//     code   = order[#{j : x > thresholds[j]}], element 2i in the high nibble of byte i
//     double-quantized: absmax -> 8 bits, see nested_absmax.cuh
//
// weight [rows, columns] bf16, fp16 or fp32, contiguous; a flat layout is one row. Rows start a
// byte and a block, the last block of a row may be short. All arithmetic is IEEE fp32 and gives the
// bits of lowbit/reference.py. NaN and Inf reach absmax and the offset; the caller looks there.
//
// A grid that fits the device at once walks the blocks. With double quantization it then meets at
// one grid barrier (cooperative launch): every scale is known, in L2, and all CTAs quantize them.
//
// Two kernels: `groups` (one row or whole blocks, blocksize <= 256) gives each lane 8 elements and
// each block a group of lanes; `blocks` gives a block to a warp and reads it twice, the second time
// from cache, 8 elements a lane or, if columns or pointers are odd, 2.
//
// Bound by memory: 2 bytes read and 0.5 + 1/64 written per bf16 weight. At 2.95 TB/s an H100 has 25
// lane-instructions per weight to spend; `groups` takes 16 (code_table.cuh says how).
//
// Callers have checked sizes, dtypes and devices.

#include <cooperative_groups.h>

#include <algorithm>

#include "code_table.cuh"
#include "nested_absmax.cuh"
#include "nf4_quantize.h"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 512;  // few large CTAs make the grid barrier cheap
constexpr int kCtasPerSm = 2;  // 64 registers
constexpr int kWarps = kThreads / kWarpSize;

// ---- elements -----------------------------------------------------------------------------------

// kWidth neighbouring elements, still in their own type.
template <typename T, int kWidth>
struct Elements;

template <typename T>
struct Elements<T, 8> {
    static constexpr int kWords = 2 * sizeof(T);
    uint32_t word[kWords];

    __device__ __forceinline__ void load(const T* p, int64_t /*count*/) {
#pragma unroll
        for (int i = 0; i < kWords; i += 4) {
            const uint4 v = load_streaming(reinterpret_cast<const uint4*>(p) + i / 4);
            word[i] = v.x, word[i + 1] = v.y, word[i + 2] = v.z, word[i + 3] = v.w;
        }
    }

    __device__ __forceinline__ void to_floats(float (&x)[8]) const {
        if constexpr (sizeof(T) == 4) {
#pragma unroll
            for (int i = 0; i < 8; i++)
                x[i] = __uint_as_float(word[i]);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 v = unpack_pair(word[i], T{});
                x[2 * i] = v.x, x[2 * i + 1] = v.y;
            }
        }
    }

    // 16-bit types compare two at a time.
    __device__ __forceinline__ float absmax() const {
        if constexpr (sizeof(T) == 4) {
            float m = fabsf(__uint_as_float(word[0]));
#pragma unroll
            for (int i = 1; i < kWords; i++)
                m = max_nan(m, fabsf(__uint_as_float(word[i])));
            return m;
        } else {
            uint32_t m = abs_pair(word[0], T{});
#pragma unroll
            for (int i = 1; i < kWords; i++)
                m = max_nan_pair(m, abs_pair(word[i], T{}), T{});
            const float2 v = unpack_pair(m, T{});
            return max_nan(v.x, v.y);
        }
    }
};

template <typename T>
struct Elements<T, 2> {
    float value[2];

    __device__ __forceinline__ void load(const T* p, int64_t count) {
        value[0] = to_float(p[0]);
        value[1] = count > 1 ? to_float(p[1]) : 0.0f;
    }

    __device__ __forceinline__ void to_floats(float (&x)[2]) const {
        x[0] = value[0], x[1] = value[1];
    }

    __device__ __forceinline__ float absmax() const {
        return max_nan(fabsf(value[0]), fabsf(value[1]));
    }
};

template <int kWidth, typename T>
__device__ __forceinline__ void
scale_elements(const Elements<T, kWidth>& elements, float inverse, float (&x)[kWidth]) {
    elements.to_floats(x);
#pragma unroll
    for (int i = 0; i < kWidth; i++)
        x[i] = __fmul_rn(x[i], inverse);
}

// ---- tables in shared memory --------------------------------------------------------------------

struct Tables {
    CodeTable codes;
    NestedTables<kThreads> nested;
};

__device__ __forceinline__ void build_tables(Tables& smem, const QuantizeArgs& a) {
    if (threadIdx.x < kWarpSize)
        build_code_table(smem.codes, a.thresholds, a.order);
    if (a.nested_codebook != nullptr)
        build_nested_tables(smem.nested, a.nested_codebook);
}

// ---- weights. Each path returns the thread's share of the sum of absmax. ------------------------

constexpr int kUnroll = 2;  // vectors of 8 elements per thread and step

// One row: a block is a group of kLanes neighbouring lanes with 8 elements each. A CTA takes every
// gridDim-th tile of kThreads vectors, kUnroll tiles a step, and loads the next step's before it
// works on this one's. The loop counts tiles of the whole CTA: it is uniform, so shuffles need no
// convergence check.
template <typename T, int kLanes>
__device__ __forceinline__ double quantize_groups(const QuantizeArgs& a, Tables& smem) {
    const T* weight = static_cast<const T*>(a.weight);
    const uint32_t vectors = static_cast<uint32_t>(a.columns / 8);
    const uint32_t step = gridDim.x * kThreads;
    // Beyond the end the last vector comes again: it cannot change the maximum of its block, and
    // the rest is not stored.
    const auto load = [&](Elements<T, 8>(&to)[kUnroll], uint32_t v) {
#pragma unroll
        for (int u = 0; u < kUnroll; u++) {
            to[u].load(weight + static_cast<int64_t>(min(v + u * step, vectors - 1)) * 8, 8);
        }
    };
    Elements<T, 8> next[kUnroll];
    load(next, blockIdx.x * kThreads + threadIdx.x);
    build_tables(smem, a);
    __syncthreads();
    const bool one_per_cell = smem.codes.one_per_cell, ordered = smem.codes.ordered;
    const bool leader = threadIdx.x % kLanes == 0;
    double sum = 0.0;
    for (uint32_t tile = blockIdx.x * kThreads; tile < vectors; tile += kUnroll * step) {
        const uint32_t v = tile + threadIdx.x;
        Elements<T, 8> now[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; u++)
            now[u] = next[u];
        load(next, v + kUnroll * step);
#pragma unroll
        for (int u = 0; u < kUnroll; u++) {
            const uint32_t at = v + u * step;
            const float absmax = group_max(now[u].absmax(), kLanes);
            float x[8];
            scale_elements(now[u], reciprocal(absmax), x);
            const uint32_t codes = encode(smem.codes, one_per_cell, ordered, x);
            if (at >= vectors)
                continue;
            reinterpret_cast<uint32_t*>(a.qweight)[at] = codes;
            if (!leader)
                continue;
            a.absmax[at / kLanes] = absmax;
            sum += absmax;
        }
    }
    return sum;
}

// A block per warp, kWidth elements per lane and step, twice: for the maximum and for the codes.
template <typename T, int kWidth>
__device__ __forceinline__ double quantize_blocks(const QuantizeArgs& a, Tables& smem) {
    build_tables(smem, a);
    __syncthreads();
    const int lane = threadIdx.x % kWarpSize;
    const int64_t blocksize = int64_t{1} << a.blocksize_log2;
    const int64_t blocks_per_row = (a.columns + blocksize - 1) >> a.blocksize_log2;
    const int64_t blocks = a.rows * blocks_per_row;
    double sum = 0.0;
    for (int64_t block = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
         block < blocks; block += static_cast<int64_t>(gridDim.x) * kWarps) {
        const int64_t row = block / blocks_per_row;
        const int64_t begin = (block - row * blocks_per_row) << a.blocksize_log2;
        const int count = static_cast<int>(min(blocksize, a.columns - begin));
        const T* source = static_cast<const T*>(a.weight) + row * a.columns + begin;
        uint8_t* target = a.qweight + row * ((a.columns + 1) / 2) + begin / 2;
        float absmax = 0.0f;
#pragma unroll 4
        for (int i = lane * kWidth; i < count; i += kWarpSize * kWidth) {
            Elements<T, kWidth> e;
            e.load(source + i, count - i);
            absmax = max_nan(absmax, e.absmax());
        }
        absmax = group_max(absmax, kWarpSize);
        const float inverse = reciprocal(absmax);
#pragma unroll 4
        for (int i = lane * kWidth; i < count; i += kWarpSize * kWidth) {
            Elements<T, kWidth> e;
            e.load(source + i, count - i);
            float x[kWidth];
            scale_elements(e, inverse, x);
            const uint32_t codes =
                encode(smem.codes, smem.codes.one_per_cell, smem.codes.ordered, x);
            if constexpr (kWidth == 8) {
                *reinterpret_cast<uint32_t*>(target + i / 2) = codes;
            } else {
                target[i / 2] = static_cast<uint8_t>(codes);
            }
        }
        if (lane == 0) {
            a.absmax[block] = absmax;
            sum += absmax;
        }
    }
    return sum;
}

// ---- kernel -------------------------------------------------------------------------------------

// What follows the weights when absmax is to be 8-bit. `sum` is the thread's share of the sum.
__device__ __forceinline__ void finish(const QuantizeArgs& a, Tables& smem, double sum) {
    if (a.nested_codebook == nullptr)
        return;
    sum = cta_sum(sum, smem.nested);
    if (threadIdx.x == 0)
        a.partial_sums[blockIdx.x] = sum;
    cooperative_groups::this_grid().sync();
    const int64_t blocksize = int64_t{1} << a.blocksize_log2;
    const int64_t blocks = a.rows * ((a.columns + blocksize - 1) >> a.blocksize_log2);
    quantize_absmax(a, blocks, smem.nested);
}

// Shared memory: tables, 1.5 KiB. Grid: any size; with double quantization it must fit the device
// (cooperative).
template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads, kCtasPerSm)
    quantize_groups_kernel(const QuantizeArgs a) {
    __shared__ Tables smem;
    finish(a, smem, quantize_groups<T, kLanes>(a, smem));
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, kCtasPerSm)
    quantize_blocks_kernel(const QuantizeArgs a) {
    __shared__ Tables smem;
    finish(a, smem, quantize_blocks<T, kWidth>(a, smem));
}

// ---- choice -------------------------------------------------------------------------------------

bool aligned(const void* p, size_t bytes) {
    return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

using Kernel = void (*)(QuantizeArgs);

template <typename T>
Kernel choose_kernel(const QuantizeArgs& a) {
    if (a.columns % 8 != 0 || !aligned(a.weight, 16) || !aligned(a.qweight, 4))
        return quantize_blocks_kernel<T, 2>;
    const bool fits_32_bits = a.columns / 8 < (int64_t{1} << 32) - (int64_t{1} << 24);
    if (a.rows > 1 || a.blocksize_log2 > 8 || !fits_32_bits)
        return quantize_blocks_kernel<T, 8>;
    switch (a.blocksize_log2) {
    case 5:
        return quantize_groups_kernel<T, 4>;
    case 6:
        return quantize_groups_kernel<T, 8>;
    case 7:
        return quantize_groups_kernel<T, 16>;
    default:
        return quantize_groups_kernel<T, 32>;
    }
}

// As many CTAs as the device holds at once, but no more than there is work for.
cudaError_t choose_grid(const void* kernel, const QuantizeArgs& a, int* grid) {
    int device = 0, sms = 0, per_sm = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess)
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, kThreads, 0);
    if (error != cudaSuccess)
        return error;
    const int64_t useful = ceil_div(a.rows * a.columns, kThreads * 8);
    *grid = static_cast<int>(std::min({int64_t{sms} * per_sm, useful, int64_t{kMaxPartialSums}}));
    return cudaSuccess;
}

template <typename T>
cudaError_t launch(const QuantizeArgs& a, cudaStream_t stream) {
    const Kernel kernel = choose_kernel<T>(a);
    int grid = 0;
    const cudaError_t error = choose_grid(reinterpret_cast<const void*>(kernel), a, &grid);
    if (error != cudaSuccess)
        return error;

    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid);
    config.blockDim = dim3(kThreads);
    config.stream = stream;
    cudaLaunchAttribute cooperative{};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    config.attrs = &cooperative;
    config.numAttrs = a.nested_codebook != nullptr ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, a);
}

}  // namespace

cudaError_t launch_quantize_4bit(const QuantizeArgs& args, cudaStream_t stream) {
    if (args.rows == 0 || args.columns == 0)
        return cudaSuccess;
    QuantizeArgs a = args;
    // Rows of whole blocks join into one.
    if (a.columns % (int64_t{1} << a.blocksize_log2) == 0) {
        a.columns *= a.rows;
        a.rows = 1;
    }
    switch (a.dtype) {
    case Dtype::kBFloat16:
        return launch<__nv_bfloat16>(a, stream);
    case Dtype::kFloat16:
        return launch<__half>(a, stream);
    case Dtype::kFloat32:
        return launch<float>(a, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace lowbit::cuda
