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
// A grid that fits the device at once walks the blocks. With double quantization it then adds up
// all scales (cooperative launch, grid_sum.cuh) and quantizes them less their mean.
//
// Two kernels: `groups` (one row or whole blocks, blocksize <= 256) gives each CTA a run of blocks,
// each block a group of lanes and each lane 8 elements. With double quantization of a weight that
// fills the device with runs of whole nested blocks, scales wait for the mean in shared memory.
// `blocks` takes rows as they come, a lane 8 elements or, if columns or pointers do not allow that,
// 4 or 2: neighbouring lanes have a block, or a warp a long one, which it reads twice, the second
// time from cache.
//
// Bound by memory: 2 bytes read and 0.5 + 1/64 written per bf16 weight. At 2.95 TB/s an H100 has 25
// lane-instructions per weight to spend; `groups` takes 13 (code_table.cuh says how). It reaches
// 92 % of the copy rate at 14336 x 4096, 87 % with double quantization (H100, 2026-11; what the
// rest is: bench/NOTES.md).
//
// Callers have checked sizes, dtypes and devices.

#include <algorithm>

#include "device.h"
#include "launch_config.h"
#include "nested_absmax.cuh"
#include "nf4_quantize.h"
#include "nf4_quantize_blocks.cuh"
#include "nf4_quantize_groups.cuh"

namespace lowbit::cuda {
namespace {

// 64 registers a thread in either shape. Where scales stay in shared memory, one large CTA per SM
// meets half as many others; smaller ones start and end faster on small weights.
constexpr int kLargeCta = 1024;
constexpr int kSmallCta = 512;

template <bool kSharedScales>
constexpr int kGroupThreads = kSharedScales ? kLargeCta : kSmallCta;

// ---- tables in shared memory --------------------------------------------------------------------

template <int kThreads>
struct Tables {
    CodeTable codes;
    NestedSmem<kThreads> nested;
};

// What a thread contributes to the tables. Read before anything else: behind the first weights it
// would wait for all of them.
struct TableInputs {
    float lower, upper;
    uint32_t code;
};

constexpr int kCodeWarp = 1;  // builds the code table; warp 0 is busy at the grid barrier
constexpr int kNestedThread = 2 * kWarpSize;  // brings the first nested threshold

__device__ __forceinline__ TableInputs load_table_inputs(const QuantizeArgs& a) {
    const int lane = threadIdx.x % kWarpSize;
    const int j = static_cast<int>(threadIdx.x) - kNestedThread;
    TableInputs in{INFINITY, INFINITY, 0};
    if (threadIdx.x / kWarpSize == kCodeWarp) {
        if (lane < kThresholds)
            in.lower = __ldg(a.thresholds + lane);
        in.code = __ldg(a.order + lane % 16);
    } else if (a.nested_codebook != nullptr && j >= 0 && j < kNestedThresholds) {
        in.lower = __ldg(a.nested_codebook + j);
        in.upper = __ldg(a.nested_codebook + j + 1);
    }
    return in;
}

template <int kThreads>
__device__ __forceinline__ void
build_tables(Tables<kThreads>& smem, const QuantizeArgs& a, const TableInputs& in) {
    static_assert(kThreads - kNestedThread >= kNestedThresholds + 2);
    const int j = static_cast<int>(threadIdx.x) - kNestedThread;
    if (threadIdx.x / kWarpSize == kCodeWarp) {
        build_code_table(smem.codes, in.lower, in.code);
    } else if (a.nested_codebook != nullptr && j >= 0 && j < kNestedThresholds + 2) {
        smem.nested.table.thresholds[j] =
            j < kNestedThresholds ? nested_threshold(j, in.lower, in.upper) : INFINITY;
    }
    __syncthreads();
}

// ---- weights. Each path returns the thread's share of the sum of absmax. ------------------------

// Contiguous runs of vectors, one per CTA, cut at multiples of a unit.
struct Split {
    uint32_t unit;  // vectors
    uint32_t units;

    __device__ __forceinline__ uint32_t begin(uint32_t cta, uint32_t vectors) const {
        const uint64_t first = static_cast<uint64_t>(units) * cta / gridDim.x;
        return static_cast<uint32_t>(min(first * unit, static_cast<uint64_t>(vectors)));
    }
};

// One row: a block is a group of kLanes neighbouring lanes with 8 elements each. Writes all scales
// of the CTA's run to `scales`.
template <typename T, int kLanes, int kThreads>
__device__ __forceinline__ void quantize_groups(
    const QuantizeArgs& a,
    uint32_t begin,
    uint32_t count,
    float* scales,
    Ring<T, kThreads>& ring,
    Tables<kThreads>& smem,
    GridSum& grid) {
    const int64_t first = static_cast<int64_t>(begin) + threadIdx.x;
    Run<T, kLanes, kThreads> run{
        static_cast<const T*>(a.weight) + first * 8, reinterpret_cast<uint32_t*>(a.qweight) + first,
        scales + threadIdx.x / kLanes, count};
    const TableInputs inputs = load_table_inputs(a);
    if (a.nested_codebook != nullptr)
        grid.open(a.partial_sums);
    run.start(ring);
    build_tables(smem, a, inputs);
    if (smem.codes.one_per_cell && smem.codes.ordered) {
        run.template quantize_all<true>(ring, smem.codes);
    } else {
        run.template quantize_all<false>(ring, smem.codes);
    }
}

// ---- kernels ------------------------------------------------------------------------------------

// Shared memory: tables, 10 KiB; weights under way, 64 bytes per thread (fp32: 128); with
// kSharedScales the CTA's scales, 4 bytes each, which never go to memory. Grid: any size; with
// double quantization it must fit the device (cooperative). kSharedScales: the unit of the split is
// whole nested blocks.
template <typename T, int kLanes, bool kSharedScales>
__global__ void
__launch_bounds__(kGroupThreads<kSharedScales>, kLargeCta / kGroupThreads<kSharedScales>)
    quantize_groups_kernel(const QuantizeArgs a, const Split split) {
    constexpr int kThreads = kGroupThreads<kSharedScales>;
    using Slots = Ring<T, kThreads>;
    __shared__ Tables<kThreads> smem;
    extern __shared__ __align__(16) uint8_t smem_dynamic[];
    Slots& ring = *reinterpret_cast<Slots*>(smem_dynamic);
    float* smem_scales = reinterpret_cast<float*>(smem_dynamic + Slots::kBytes);
    const uint32_t vectors = static_cast<uint32_t>(a.columns / 8);
    const uint32_t begin = split.begin(blockIdx.x, vectors);
    const uint32_t count = split.begin(blockIdx.x + 1, vectors) - begin;
    float* scales = kSharedScales ? smem_scales : a.absmax + begin / kLanes;
    GridSum grid;
    quantize_groups<T, kLanes>(a, begin, count, scales, ring, smem, grid);
    if (a.nested_codebook == nullptr)
        return;
    grid.wait_open();
    const uint32_t own = (count + kLanes - 1) / kLanes;
    double sum = 0.0;
    for (uint32_t i = threadIdx.x; i < own; i += kThreads)
        sum += scales[i];
    const int64_t blocks = (a.columns / 8 + kLanes - 1) / kLanes;
    if constexpr (kSharedScales) {
        quantize_own_absmax(a, scales, begin / kLanes, own, sum, blocks, grid, smem.nested);
    } else {
        quantize_absmax(a, sum, blocks, grid, smem.nested);
    }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kSmallCta, kLargeCta / kSmallCta)
    quantize_blocks_kernel(const QuantizeArgs a) {
    __shared__ Tables<kSmallCta> smem;
    GridSum grid;
    const TableInputs inputs = load_table_inputs(a);
    if (a.nested_codebook != nullptr)
        grid.open(a.partial_sums);
    build_tables(smem, a, inputs);
    constexpr int kWarps = kSmallCta / kWarpSize;
    const int64_t blocksize = int64_t{1} << a.blocksize_log2;
    const int64_t blocks = a.rows * ((a.columns + blocksize - 1) >> a.blocksize_log2);
    const double sum = blocksize <= kWarpSize * kWidth && blocks <= INT32_MAX
                           ? quantize_short_blocks<T, kWidth, kWarps>(a, smem.codes)
                           : quantize_long_blocks<T, kWidth, kWarps>(a, smem.codes);
    if (a.nested_codebook == nullptr)
        return;
    grid.wait_open();
    quantize_absmax(a, sum, blocks, grid, smem.nested);
}

// ---- choice -------------------------------------------------------------------------------------

// As many CTAs of kSmallCta as the device holds at once.
cudaError_t largest_grid(const void* kernel, size_t smem_bytes, int64_t* grid) {
    int per_sm = 0;
    const cudaError_t error =
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, kSmallCta, smem_bytes);
    *grid = std::min(int64_t{sm_count()} * per_sm, int64_t{kMaxPartialSums});
    return error == cudaSuccess && *grid == 0 ? cudaErrorInvalidConfiguration : error;
}

// The smallest grid whose largest share is that of `grid`: the shares come out even.
int64_t even_grid(int64_t units, int64_t grid) {
    return ceil_div(units, ceil_div(units, grid));
}

template <typename... Params>
cudaError_t launch_kernel(
    void (*kernel)(Params...),
    int64_t grid,
    int threads,
    size_t smem_bytes,
    cudaStream_t stream,
    const QuantizeArgs& a,
    const Split& split) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid));
    config.blockDim = dim3(threads);
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
    const int64_t useful = ceil_div(a.rows * a.columns, kSmallCta * 8);
    return launch_kernel(kernel, std::min(grid, useful), kSmallCta, 0, stream, a, Split{});
}

// Scales stay in shared memory if the CTA's share fits and whole nested blocks divide into shares
// for most of the SMs.
struct SharedPlan {
    bool fits;
    Split split;
    int64_t grid;
    size_t bytes;
    int limit;  // of bytes, on this device
};

template <typename T, int kLanes>
SharedPlan plan_shared_scales(const QuantizeArgs& a) {
    const int64_t unit =
        std::max(int64_t{kLanes} << a.nested_blocksize_log2, int64_t{kUnroll} * kLargeCta);
    const int64_t units = ceil_div(a.columns / 8, unit);
    const int64_t grid = even_grid(units, sm_count());
    const int64_t scales = ceil_div(units, grid) * (unit / kLanes);
    const size_t bytes = Ring<T, kLargeCta>::kBytes + scales * sizeof(float);
    // 12 KiB for the tables and what the system keeps.
    const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) - 12288;
    const bool fits = static_cast<int64_t>(bytes) <= limit && 4 * grid >= 3 * sm_count();
    const Split split{static_cast<uint32_t>(unit), static_cast<uint32_t>(units)};
    return {fits, split, grid, bytes, limit};
}

template <typename T, int kLanes>
cudaError_t
launch_shared_scales(const QuantizeArgs& a, const SharedPlan& plan, cudaStream_t stream) {
    constexpr auto kernel = quantize_groups_kernel<T, kLanes, true>;
    const cudaError_t error = allow_shared_memory<kernel>(plan.limit);
    if (error != cudaSuccess)
        return error;
    return launch_kernel(kernel, plan.grid, kLargeCta, plan.bytes, stream, a, plan.split);
}

template <typename T, int kLanes>
cudaError_t launch_groups(const QuantizeArgs& a, cudaStream_t stream) {
    if (a.nested_codebook != nullptr) {
        const SharedPlan plan = plan_shared_scales<T, kLanes>(a);
        if (plan.fits)
            return launch_shared_scales<T, kLanes>(a, plan, stream);
    }
    constexpr size_t kRing = Ring<T, kSmallCta>::kBytes;
    constexpr int kStep = kUnroll * kSmallCta;
    constexpr auto kernel = quantize_groups_kernel<T, kLanes, false>;
    int64_t largest = 0;
    cudaError_t error = allow_shared_memory<kernel>(kRing);
    if (error == cudaSuccess)
        error = largest_grid(reinterpret_cast<const void*>(kernel), kRing, &largest);
    if (error != cudaSuccess)
        return error;
    const int64_t vectors = a.columns / 8;
    const int64_t unit = ceil_div(vectors, kStep) >= largest ? kStep : kSmallCta;
    const int64_t units = ceil_div(vectors, unit);
    const Split split{static_cast<uint32_t>(unit), static_cast<uint32_t>(units)};
    return launch_kernel(kernel, even_grid(units, largest), kSmallCta, kRing, stream, a, split);
}

template <typename T>
cudaError_t launch(const QuantizeArgs& a, cudaStream_t stream) {
    const auto fits = [&](int width) {
        return a.columns % width == 0 &&
               is_aligned(a.weight, std::min(16, width * int{sizeof(T)})) &&
               is_aligned(a.qweight, width / 2);
    };
    if (!fits(8))
        return fits(4) ? launch_blocks<T, 4>(a, stream) : launch_blocks<T, 2>(a, stream);
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
