// The launch before nf4_lora_matmul_large_kernel.cuh: counters at zero, the ring's first chunks, as
// all wait for them, and copies of operands that TMA cannot take as they are.
//
// Nothing runs beside it, as the main kernel needs whole SMs, so its time is added to the
// product's. It may start while the kernel before it still runs, on SMs that this has left: until
// that is over it has addresses computed and what it will read fetched into L2. Its CTAs are kept
// apart by shared memory that they do not use: else those few SMs take all of them, eight each, and
// the others wait (3 % of y and of a step at N = K = 4096, M = 4096; H200, 2026-11).
#pragma once

#include "nf4_lora_matmul_large_decode.cuh"

namespace lowbit::cuda {
namespace {

// The grid: as many CTAs in x as a step of all panels needs; in y the steps of the first chunks,
// and behind them rows of CTAs for the copies. Two threads decode a block; with one word of it
// each, most of their instructions would scale the codebook.
constexpr int kPrepareThreads = 256;
constexpr int kPrepareLines = kPrepareThreads / 2;

// The panels of the first wave with tiles are known to the host.
inline dim3 prepare_grid(const Plan& plan, const Wave& range, int64_t copied) {
    constexpr int64_t kCopyRows = 64;  // at most
    const int columns = range.panels * (kPanelRows / kPrepareLines);
    const int64_t copy_rows = std::min(kCopyRows, ceil_div(copied, columns * kPrepareThreads));
    return dim3(columns, first_steps(plan) + static_cast<unsigned>(copy_rows));
}

constexpr int kPrepareSmemBytes = (228 / 2 - 1) << 10;  // at most: two CTAs per SM

// So much that an SM holds no more CTAs than it takes to have all of them at once.
inline size_t prepare_smem_bytes(const Plan& plan, dim3 grid) {
    const int64_t per_sm = ceil_div(grid.x * grid.y, kCtas * plan.clusters);
    return (int64_t{228} << 10) / std::clamp<int64_t>(per_sm, 2, 8) - 1024;
}

// What a thread of a CTA for the copies copies: each stride-th from the first on.
struct CopyShare {
    int first, stride;

    __device__ __forceinline__ explicit CopyShare(const Plan& plan) {
        const int row = static_cast<int>(blockIdx.y) - first_steps(plan);
        const int rows = static_cast<int>(gridDim.y) - first_steps(plan);
        first = (row * gridDim.x + blockIdx.x) * kPrepareThreads + threadIdx.x;
        stride = rows * gridDim.x * kPrepareThreads;
    }
};

__device__ __forceinline__ bool starts_ring(const Plan& plan) {
    return static_cast<int>(blockIdx.y) < first_steps(plan);
}

// x: or dy, [M, depth].
template <typename T, class Product>
__device__ __forceinline__ void
start_ring(const Params& p, const Wave& range, const T* x, uint4* ring) {
    constexpr int kWords = kLine / 8;
    const Plan& plan = p.plan;
    const WeightView& w = p.w;
    const int thread = (blockIdx.y * gridDim.x + blockIdx.x) * kPrepareThreads + threadIdx.x;
    const int line = blockIdx.x * kPrepareLines + threadIdx.x / 2;
    const Place place = Product::of_line(plan, range, blockIdx.y, line);
    const int64_t element = element_at(w, place.row, place.column, kLine);
    const int64_t block = element >> w.blocksize_log2;
    // The two threads take turns at the words, so that what they store together fills sectors.
    const int first_word = threadIdx.x % 2;
    const auto* codes = reinterpret_cast<const uint32_t*>(w.qweight + element / 2) + first_word;
    const bool nested = w.absmax == nullptr;
    prefetch_l2(codes);
    prefetch_l2(w.codebook);
    if (nested) {
        prefetch_l2(w.absmax_8bit + block);
        prefetch_l2(w.nested_absmax + (block >> w.nested_blocksize_log2));
        prefetch_l2(w.nested_codebook + threadIdx.x);
        prefetch_l2(w.nested_offset);
    } else {
        prefetch_l2(w.absmax + block);
    }
    // What the main kernel's stages are first filled with.
    const int token = thread / kStages, column = thread % kStages * kStepDepth;
    if (token < min(plan.M, largest_group(plan) * kTileTokens) && column < plan.depth)
        prefetch_l2(x + int64_t{token} * plan.depth + column);

    wait_for_previous_kernel();
    // In the order in which they are needed.
    uint32_t absmax;
    float nested_absmax = 0.0f, offset = 0.0f;
    if (nested) {
        absmax = w.absmax_8bit[block];
        nested_absmax = w.nested_absmax[block >> w.nested_blocksize_log2];
        offset = *w.nested_offset;
    } else {
        absmax = __float_as_uint(w.absmax[block]);
    }
    const Codebook codebook = load_codebook(w.codebook);
    uint32_t words[kWords / 2];
#pragma unroll
    for (int i = 0; i < kWords / 2; i++)
        words[i] = codes[2 * i];
    const float scale = nested
                            ? __fadd_rn(__fmul_rn(w.nested_codebook[absmax], nested_absmax), offset)
                            : __uint_as_float(absmax);
    const ScaledTable<> table = scale_codebook<T>(codebook, scale);
    uint4* to = ring + place.line * kWords + first_word;
#pragma unroll
    for (int i = 0; i < kWords / 2; i++)
        to[2 * i] = decode_word(table, words[i]);
    for (int i = thread; i < counters(plan); i += gridDim.x * first_steps(plan) * kPrepareThreads)
        p.ready[i] = i < first_chunks(plan) ? range.panels * kTasksPerPanel : 0;
}

}  // namespace
}  // namespace lowbit::cuda
