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
// one grid barrier (cooperative launch), where the mean of all scales is known, and quantizes them.
//
// Two kernels: `groups` (one row or whole blocks, blocksize <= 256) gives each CTA a run of blocks,
// each block a group of lanes and each lane 8 elements; if a run is whole nested blocks, its scales
// wait for the barrier in shared memory. `blocks` gives a block to a warp and reads it twice, the
// second time from cache, 8 elements a lane or, if columns or pointers are odd, 2.
//
// Bound by memory: 2 bytes read and 0.5 + 1/64 written per bf16 weight. At 2.95 TB/s an H100 has 25
// lane-instructions per weight to spend; `groups` takes 13 (code_table.cuh says how). It reaches
// 90 % of the copy rate at 14336 x 4096, 80 % with double quantization, whose barrier and second
// phase are latency (bench/results/cuda_quantize_h100.json).
//
// Callers have checked sizes, dtypes and devices.

#include <cooperative_groups.h>

#include <algorithm>

#include "code_table.cuh"
#include "device.h"
#include "elements.cuh"
#include "nested_absmax.cuh"
#include "nf4_quantize.h"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 512;  // few large CTAs make the grid barrier cheap
constexpr int kCtasPerSm = 2;  // 64 registers
constexpr int kWarps = kThreads / kWarpSize;

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
constexpr int kStep = kUnroll * kThreads;

// Contiguous runs of vectors, one per CTA, cut at multiples of a unit.
struct Split {
    uint32_t unit;  // vectors
    uint32_t units;

    __device__ __forceinline__ uint32_t begin(uint32_t cta, uint32_t vectors) const {
        const uint64_t first = static_cast<uint64_t>(units) * cta / gridDim.x;
        return static_cast<uint32_t>(min(first * unit, static_cast<uint64_t>(vectors)));
    }
};

// What reciprocal() gives, for several at once: one test finds the values beyond the range in which
// a Newton step makes the hardware's estimate exact, where __frcp_rn has a test and a call for
// each.
template <int kCount>
__device__ __forceinline__ void
reciprocals(const float (&absmax)[kCount], float (&inverse)[kCount]) {
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
    for (int u = 0; u < kCount; u++)
        inverse[u] = reciprocal(absmax[u]);
}

// What a thread has under way: kStages steps of kUnroll vectors in slots of shared memory that only
// this thread writes and reads, so no barrier is needed.
template <typename T>
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
                    &slot[stage][u * kWords / 4 + i][threadIdx.x],
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
template <typename T, int kLanes>
struct Run {
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
    quantize(const Elements<T, 8> (&from)[kUnroll], const CodeTable& table) {
        float absmax[kUnroll], inverse[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; u++)
            absmax[u] = group_max(from[u].absmax(), kLanes);
        reciprocals(absmax, inverse);
#pragma unroll
        for (int u = 0; u < kUnroll; u++) {
            float x[8];
            scale_elements(from[u], inverse[u], x);
            const uint32_t codes =
                encode(table, kFast || table.one_per_cell, kFast || table.ordered, x);
            if (kRest && u * kThreads + threadIdx.x >= count)
                continue;
            target[u * kThreads] = codes;
            if (threadIdx.x % kLanes == 0)
                scales[u * (kThreads / kLanes)] = absmax[u];
        }
        target += kStep;
        scales += kStep / kLanes;
    }

    __device__ __forceinline__ void start(Ring<T>& ring) {
        const uint32_t steps = count / kStep;
#pragma unroll
        for (int s = 0; s < Ring<T>::kStages; s++) {
            if (s < steps)
                ring.fetch(s, source + s * (kStep * 8));
            commit_async();
        }
    }

    // Branches are the same for the whole CTA, so shuffles need no convergence check.
    template <bool kFast>
    __device__ __forceinline__ void quantize_all(Ring<T>& ring, const CodeTable& table) {
        constexpr int kStages = Ring<T>::kStages;
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
            quantize<kFast, false>(now, table);
        }
        if (count > 0) {
            Elements<T, 8> now[kUnroll];
            load_rest(now);
            quantize<kFast, true>(now, table);
        }
    }
};

// One row: a block is a group of kLanes neighbouring lanes with 8 elements each. Writes all scales
// of the CTA's run to `scales`.
template <typename T, int kLanes>
__device__ __forceinline__ void quantize_groups(
    const QuantizeArgs& a,
    uint32_t begin,
    uint32_t count,
    float* scales,
    Ring<T>& ring,
    Tables& smem) {
    const int64_t first = static_cast<int64_t>(begin) + threadIdx.x;
    Run<T, kLanes> run{
        static_cast<const T*>(a.weight) + first * 8, reinterpret_cast<uint32_t*>(a.qweight) + first,
        scales + threadIdx.x / kLanes, count};
    run.start(ring);
    build_tables(smem, a);
    __syncthreads();
    if (smem.codes.one_per_cell && smem.codes.ordered) {
        run.template quantize_all<true>(ring, smem.codes);
    } else {
        run.template quantize_all<false>(ring, smem.codes);
    }
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

// ---- kernels ------------------------------------------------------------------------------------

// Leaves the CTA's sum of absmax for all and waits for theirs.
__device__ __forceinline__ void share_sum(const QuantizeArgs& a, Tables& smem, double sum) {
    sum = cta_sum(sum, smem.nested);
    if (threadIdx.x == 0)
        a.partial_sums[blockIdx.x] = sum;
    cooperative_groups::this_grid().sync();
}

// Shared memory: tables, 1.5 KiB, and with kSharedScales the CTA's scales, 4 bytes each: they never
// go to memory. Grid: any size; with double quantization it must fit the device (cooperative).
// kSharedScales: the unit of the split is whole nested blocks.
template <typename T, int kLanes, bool kSharedScales>
__global__ void __launch_bounds__(kThreads, kCtasPerSm)
    quantize_groups_kernel(const QuantizeArgs a, const Split split) {
    __shared__ Tables smem;
    extern __shared__ __align__(16) uint8_t smem_dynamic[];
    Ring<T>& ring = *reinterpret_cast<Ring<T>*>(smem_dynamic);
    float* smem_scales = reinterpret_cast<float*>(smem_dynamic + Ring<T>::kBytes);
    const uint32_t vectors = static_cast<uint32_t>(a.columns / 8);
    const uint32_t begin = split.begin(blockIdx.x, vectors);
    const uint32_t count = split.begin(blockIdx.x + 1, vectors) - begin;
    float* scales = kSharedScales ? smem_scales : a.absmax + begin / kLanes;
    quantize_groups<T, kLanes>(a, begin, count, scales, ring, smem);
    if (a.nested_codebook == nullptr)
        return;
    __syncthreads();
    const uint32_t own = (count + kLanes - 1) / kLanes;
    double sum = 0.0;
    for (uint32_t i = threadIdx.x; i < own; i += kThreads)
        sum += scales[i];
    share_sum(a, smem, sum);
    const int64_t blocks = (a.columns / 8 + kLanes - 1) / kLanes;
    if constexpr (kSharedScales) {
        quantize_own_absmax(a, scales, begin / kLanes, own, blocks, smem.nested);
    } else {
        quantize_absmax(a, blocks, smem.nested);
    }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, kCtasPerSm)
    quantize_blocks_kernel(const QuantizeArgs a) {
    __shared__ Tables smem;
    const double sum = quantize_blocks<T, kWidth>(a, smem);
    if (a.nested_codebook == nullptr)
        return;
    share_sum(a, smem, sum);
    const int64_t blocksize = int64_t{1} << a.blocksize_log2;
    quantize_absmax(a, a.rows * ((a.columns + blocksize - 1) >> a.blocksize_log2), smem.nested);
}

// ---- choice -------------------------------------------------------------------------------------

// As many CTAs as the device holds at once.
cudaError_t largest_grid(const void* kernel, size_t smem_bytes, int64_t* grid) {
    int per_sm = 0;
    const cudaError_t error =
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, kThreads, smem_bytes);
    *grid = std::min(int64_t{sm_count()} * per_sm, int64_t{kMaxPartialSums});
    return error == cudaSuccess && *grid == 0 ? cudaErrorInvalidConfiguration : error;
}

cudaError_t allow_shared(const void* kernel, size_t bytes) {
    return cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

// The smallest grid whose largest share is that of `grid`: the shares come out even.
int64_t even_grid(int64_t units, int64_t grid) {
    return ceil_div(units, ceil_div(units, grid));
}

template <typename... Params>
cudaError_t launch_kernel(
    void (*kernel)(Params...),
    int64_t grid,
    size_t smem_bytes,
    cudaStream_t stream,
    const QuantizeArgs& a,
    const Split& split) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = smem_bytes;
    config.stream = stream;
    cudaLaunchAttribute cooperative{};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    config.attrs = &cooperative;
    config.numAttrs = a.nested_codebook != nullptr ? 1 : 0;
    if constexpr (sizeof...(Params) == 1) {
        return cudaLaunchKernelEx(&config, kernel, a);
    } else {
        return cudaLaunchKernelEx(&config, kernel, a, split);
    }
}

template <typename T, int kWidth>
cudaError_t launch_blocks(const QuantizeArgs& a, cudaStream_t stream) {
    const auto kernel = quantize_blocks_kernel<T, kWidth>;
    int64_t grid = 0;
    const cudaError_t error = largest_grid(reinterpret_cast<const void*>(kernel), 0, &grid);
    if (error != cudaSuccess)
        return error;
    const int64_t useful = ceil_div(a.rows * a.columns, kThreads * 8);
    return launch_kernel(kernel, std::min(grid, useful), 0, stream, a, Split{});
}

// Scales stay in shared memory if the CTA's share fits and whole nested blocks divide into shares
// for most of the CTAs.
template <typename T, int kLanes>
cudaError_t launch_groups(const QuantizeArgs& a, cudaStream_t stream) {
    const auto kernel = quantize_groups_kernel<T, kLanes, false>;
    const auto shared_kernel = quantize_groups_kernel<T, kLanes, true>;
    constexpr size_t kRing = Ring<T>::kBytes;
    int64_t largest = 0;
    cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel), kRing);
    if (error == cudaSuccess)
        error = largest_grid(reinterpret_cast<const void*>(kernel), kRing, &largest);
    if (error != cudaSuccess)
        return error;
    const int64_t vectors = a.columns / 8;
    if (a.nested_codebook != nullptr) {
        const int64_t unit = std::max(int64_t{kLanes} << a.nested_blocksize_log2, int64_t{kStep});
        const int64_t units = ceil_div(vectors, unit);
        const int64_t grid = even_grid(units, largest);
        const int64_t bytes = kRing + ceil_div(units, grid) * (unit / kLanes) * sizeof(float);
        const int64_t per_sm = ceil_div(largest, sm_count());
        // 4 KiB for the tables and what the system keeps.
        const int64_t limit =
            device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / per_sm - 4096;
        if (bytes <= limit && 4 * grid >= 3 * largest) {
            error = allow_shared(reinterpret_cast<const void*>(shared_kernel), bytes);
            if (error != cudaSuccess)
                return error;
            const Split split{static_cast<uint32_t>(unit), static_cast<uint32_t>(units)};
            return launch_kernel(shared_kernel, grid, bytes, stream, a, split);
        }
    }
    const int64_t unit = ceil_div(vectors, kStep) >= largest ? kStep : kThreads;
    const int64_t units = ceil_div(vectors, unit);
    const Split split{static_cast<uint32_t>(unit), static_cast<uint32_t>(units)};
    return launch_kernel(kernel, even_grid(units, largest), kRing, stream, a, split);
}

template <typename T>
cudaError_t launch(const QuantizeArgs& a, cudaStream_t stream) {
    if (a.columns % 8 != 0 || !is_aligned(a.weight, 16) || !is_aligned(a.qweight, 4))
        return launch_blocks<T, 2>(a, stream);
    const bool fits_32_bits = a.columns / 8 < (int64_t{1} << 32) - (int64_t{1} << 24);
    if (a.rows > 1 || a.blocksize_log2 > 8 || !fits_32_bits)
        return launch_blocks<T, 8>(a, stream);
    switch (a.blocksize_log2) {
    case 5:
        return launch_groups<T, 4>(a, stream);
    case 6:
        return launch_groups<T, 8>(a, stream);
    case 7:
        return launch_groups<T, 16>(a, stream);
    default:
        return launch_groups<T, 32>(a, stream);
    }
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
