// 4-bit dequantization of a window of a weight, any 16-entry codebook, scales plain or nested.
//
//     out[i, c] = RN_T(codebook[q[n, k]] * absmax[block(n, k)]),  n = row0 + i, k = column0 + c
//     nested:     absmax = RN(RN(nested_codebook[absmax_8bit] * nested_absmax) + nested_offset)
//
// Weight: see weight.h. out [rows, columns] contiguous, T = bf16, fp16 or fp32. One fp32 product
// and one rounding to nearest even per element, so every path gives the same bits.
//
// Three kernels, one launch each, chosen by the window's alignment:
//   blocks   16-bit T, everything a multiple of 64: a thread owns 64 codes (32 bytes) and looks
//            them up by PRMT in a table of 16 scaled values that it builds in registers;
//            6.4 instructions per weight in all, 4.7 of them decode
//   vectors  multiples of 8 or 4 codes (fp32: 4): a thread decodes as many codes as fill a store of
//            16 or 8 bytes, codebook in shared memory, one scale per store; 10 to 16 instructions
//            where it has 16
//   scalars  the rest: odd columns, windows that start at an odd code, unaligned pointers
//
// Bound by memory: 0.5 + 1/64 bytes read (blocksize 64, nested) and sizeof(T) written per weight,
// 2.516 for bf16. An H100 moves 2.95 TB/s, 5.2 weights per clock and SM, and issues 128
// lane-instructions: what counts is not their number but that all accesses are full sectors.
// Storing straight from the owner of a block is 3.2-3.8 times slower (H100, 2026-11), hence the
// transpose through shared memory.
//
// Callers have checked sizes, dtypes and devices.

#include <algorithm>
#include <type_traits>

#include "block_decode.cuh"
#include "device.h"
#include "launch_config.h"
#include "nf4_dequantize.h"

namespace lowbit::cuda {
namespace {

// Where row i of the window starts, all linear in i. A code's position is counted in nibbles of
// qweight; its block is block + ((offset + c) >> blocksize_log2).
struct Source {
    int64_t nibble0, nibble_stride;
    int64_t block0, block_stride;
    int64_t offset0, offset_stride;
    int64_t rows, columns;
};

Source make_source(const WeightView& w, const DequantizeWindow& window) {
    Source s{};
    s.rows = window.rows;
    s.columns = window.columns;
    s.nibble_stride = w.flat ? w.K : 2 * ceil_div(w.K, 2);
    s.nibble0 = window.row0 * s.nibble_stride + window.column0;
    if (w.flat) {
        s.offset0 = s.nibble0;
        s.offset_stride = s.nibble_stride;
    } else {
        s.block_stride = ceil_div(w.K, int64_t{1} << w.blocksize_log2);
        s.block0 = window.row0 * s.block_stride;
        s.offset0 = window.column0;
    }
    if (w.flat && window.columns == w.K) {  // consecutive rows join into one
        s.columns *= s.rows;
        s.rows = 1;
    }
    return s;
}

// ---- blocks -------------------------------------------------------------------------------------

constexpr int kUnit = 64;            // codes per thread
constexpr int kBlocksThreads = 128;  // small CTAs end together better than large ones
constexpr int kBlocksPerSm = 10;     // 48 registers; left alone ptxas takes 32, and loads in series

struct Unit {
    uint4 packed[2];
    float scale[2];  // of its two halves: they differ when blocksize is 32
};

template <bool kNested, bool kTwoScales>
__device__ __forceinline__ Unit load_unit(const WeightView& w, const Source& s, uint32_t unit) {
    const uint32_t per_row = static_cast<uint32_t>(s.columns / kUnit);
    const uint32_t row = unit / per_row;
    const int64_t code = static_cast<int64_t>(unit - row * per_row) * kUnit;
    const int64_t byte = (s.nibble0 + row * s.nibble_stride + code) >> 1;
    const uint4* packed = reinterpret_cast<const uint4*>(w.qweight + byte);
    Unit u;
    u.packed[0] = load_streaming(packed);
    u.packed[1] = load_streaming(packed + 1);
    const int64_t offset = s.offset0 + row * s.offset_stride + code;
    const int64_t block = s.block0 + row * s.block_stride + (offset >> w.blocksize_log2);
    u.scale[0] = block_scale<kNested>(w, block);
    u.scale[1] = kTwoScales ? block_scale<kNested>(w, block + 1) : u.scale[0];
    return u;
}

// One warp turns 32 units into 4 KiB of contiguous output. Shared memory: 4 KiB per warp, 16 KiB in
// all; chunk c of lane l lies at c ^ (l % 8), so both the row-wise stores and the column-wise loads
// of 8 lanes touch all 32 banks.
template <typename T, bool kNested, bool kTwoScales>
__global__ void __launch_bounds__(kBlocksThreads, kBlocksPerSm) dequantize_blocks_kernel(
    const WeightView w,    // scales and codes
    const Source s,        // columns, nibbles and offsets are multiples of 64
    const uint32_t units,  // rows * columns / 64
    uint4* out             // [rows * columns / 8]
) {
    __shared__ uint4 smem[kBlocksThreads / kWarpSize][kWarpSize * 8];
    const uint32_t lane = threadIdx.x % kWarpSize;
    const uint32_t first =
        blockIdx.x * kBlocksThreads + threadIdx.x - lane;  // the warp's first unit
    if (first >= units)
        return;  // nothing below spans warps
    const uint32_t left = units - first;
    uint4* tile = smem[threadIdx.x / kWarpSize];

    const Unit u = load_unit<kNested, kTwoScales>(w, s, first + min(lane, left - 1));
    const Codebook codebook = load_aligned_codebook(w.codebook);
    uint4* chunks = tile + lane * 8;
    ScaledTable<> table = scale_codebook<T>(codebook, u.scale[0]);
    chunks[0 ^ (lane % 8)] = decode_word(table, u.packed[0].x);
    chunks[1 ^ (lane % 8)] = decode_word(table, u.packed[0].y);
    chunks[2 ^ (lane % 8)] = decode_word(table, u.packed[0].z);
    chunks[3 ^ (lane % 8)] = decode_word(table, u.packed[0].w);
    if (kTwoScales)
        table = scale_codebook<T>(codebook, u.scale[1]);
    chunks[4 ^ (lane % 8)] = decode_word(table, u.packed[1].x);
    chunks[5 ^ (lane % 8)] = decode_word(table, u.packed[1].y);
    chunks[6 ^ (lane % 8)] = decode_word(table, u.packed[1].z);
    chunks[7 ^ (lane % 8)] = decode_word(table, u.packed[1].w);
    __syncwarp();

    out += static_cast<int64_t>(first) * 8 + lane;
#pragma unroll
    for (uint32_t j = 0; j < 8; j++) {
        const uint32_t unit = j * 4 + lane / 8;
        const uint32_t chunk = (lane ^ unit) % 8;
        if (unit < left)
            out[j * kWarpSize] = tile[unit * 8 + chunk];
    }
}

// ---- vectors ------------------------------------------------------------------------------------

constexpr int kVectorsThreads = 256;
constexpr int kVectorsPerThread = 4;  // independent loads in flight

template <int kWidth>
using PackedVector = std::conditional_t<kWidth == 8, uint32_t, uint16_t>;

template <typename T, int kWidth>
using Vector = std::conditional_t<kWidth * sizeof(T) == 16, uint4, uint2>;

// Values of codes 2b and 2b + 1; 4-byte entries make a nibble shifted left by two a byte offset.
__device__ __forceinline__ float2
decode_byte(const float* smem_codebook, uint32_t packed, int b, float scale) {
    const uint32_t first = b == 0 ? packed >> 2 : packed >> (8 * b + 2);
    const uint32_t second = b == 0 ? packed << 2 : packed >> (8 * b - 2);
    const char* base = reinterpret_cast<const char*>(smem_codebook);
    return {
        __fmul_rn(*reinterpret_cast<const float*>(base + (first & 0x3c)), scale),
        __fmul_rn(*reinterpret_cast<const float*>(base + (second & 0x3c)), scale)};
}

template <typename T, int kWidth>
__device__ __forceinline__ Vector<T, kWidth>
decode_vector(const float* smem_codebook, uint32_t packed, float scale) {
    uint32_t out[kWidth * sizeof(T) / 4];
#pragma unroll
    for (int b = 0; b < kWidth / 2; b++) {
        const float2 v = decode_byte(smem_codebook, packed, b, scale);
        if constexpr (sizeof(T) == 2) {
            out[b] = pack_pair(v.x, v.y, T{});
        } else {
            out[2 * b] = __float_as_uint(v.x);
            out[2 * b + 1] = __float_as_uint(v.y);
        }
    }
    if constexpr (sizeof(out) == 16)
        return {out[0], out[1], out[2], out[3]};
    else
        return {out[0], out[1]};
}

// The 16 words of the codebook lie in 16 banks: any 32 lookups are conflict-free.
template <typename T, int kWidth, bool kNested, bool kOneRow>
__global__ void __launch_bounds__(kVectorsThreads) dequantize_vectors_kernel(
    const WeightView w,      // scales and codes
    const Source s,          // columns, nibbles and offsets are multiples of the vector width
    const uint32_t vectors,  // rows * columns / width
    Vector<T, kWidth>* out   // [vectors]
) {
    __shared__ float smem_codebook[16];
    if (threadIdx.x < 16)
        smem_codebook[threadIdx.x] = w.codebook[threadIdx.x];
    __syncthreads();

    const uint32_t per_row = kOneRow ? 0 : static_cast<uint32_t>(s.columns / kWidth);
    const uint32_t first = blockIdx.x * (kVectorsThreads * kVectorsPerThread) + threadIdx.x;
    uint32_t packed[kVectorsPerThread];
    float scale[kVectorsPerThread];
#pragma unroll
    for (int j = 0; j < kVectorsPerThread; j++) {
        const uint32_t vector =
            min(first + j * kVectorsThreads, vectors - 1);  // no branch between the loads
        const uint32_t row = kOneRow ? 0 : vector / per_row;
        const int64_t code = static_cast<int64_t>(vector - row * per_row) * kWidth;
        const int64_t byte = (s.nibble0 + row * s.nibble_stride + code) >> 1;
        packed[j] = __ldg(reinterpret_cast<const PackedVector<kWidth>*>(w.qweight + byte));
        const int64_t offset = s.offset0 + row * s.offset_stride + code;
        scale[j] =
            block_scale<kNested>(w, s.block0 + row * s.block_stride + (offset >> w.blocksize_log2));
    }
#pragma unroll
    for (int j = 0; j < kVectorsPerThread; j++) {
        const uint32_t vector = first + j * kVectorsThreads;
        if (vector < vectors)
            out[vector] = decode_vector<T, kWidth>(smem_codebook, packed[j], scale[j]);
    }
}

// ---- scalars ------------------------------------------------------------------------------------

constexpr int kScalarsThreads = 256;
constexpr int kBytesPerThread = 8;
constexpr int kBytesPerCta = kScalarsThreads * kBytesPerThread;

// A CTA walks kBytesPerCta bytes of one row of the window; a row that starts at an odd code enters
// its first byte in the middle.
template <typename T, bool kNested>
__global__ void __launch_bounds__(kScalarsThreads) dequantize_scalars_kernel(
    const WeightView w,            // scales and codes
    const Source s,                // any
    const int64_t chunks_per_row,  // CTAs per row of the window
    T* out                         // [rows, columns]
) {
    __shared__ float smem_codebook[16];
    if (threadIdx.x < 16)
        smem_codebook[threadIdx.x] = w.codebook[threadIdx.x];
    __syncthreads();

    const int64_t row = blockIdx.x / chunks_per_row;
    const int64_t chunk = blockIdx.x - row * chunks_per_row;
    const int64_t nibble = s.nibble0 + row * s.nibble_stride;
    const int odd = static_cast<int>(nibble & 1);
    const uint8_t* bytes = w.qweight + (nibble >> 1);
    const int64_t offset = s.offset0 + row * s.offset_stride;
    const int64_t block = s.block0 + row * s.block_stride;
    out += row * s.columns;
#pragma unroll
    for (int j = 0; j < kBytesPerThread; j++) {
        const int64_t byte = chunk * kBytesPerCta + j * kScalarsThreads + threadIdx.x;
        const int64_t column = 2 * byte - odd;  // of the high nibble
        if (column >= s.columns)
            break;
        const int64_t inside = max(column, int64_t{0});
        // Blocks are even, so both codes of a byte share one.
        const int64_t own_block = block + ((offset + inside) >> w.blocksize_log2);
        const float scale = block_scale<kNested>(w, own_block);
        const float2 v = decode_byte(smem_codebook, __ldg(bytes + byte), 0, scale);
        if (column >= 0)
            out[column] = from_float<T>(v.x);
        if (column + 1 < s.columns)
            out[column + 1] = from_float<T>(v.y);
    }
}

// ---- choice -------------------------------------------------------------------------------------

// Whether runs of `width` codes never straddle a row, and can be counted in 32 bits.
bool tiles(const Source& s, int64_t width) {
    return s.columns % width == 0 && s.nibble0 % width == 0 && s.offset0 % width == 0 &&
           (s.rows == 1 || (s.nibble_stride % width == 0 && s.offset_stride % width == 0)) &&
           s.rows * s.columns / width < (int64_t{1} << 32) - (1 << 16);
}

template <typename T, bool kNested>
cudaError_t launch_blocks(const WeightView& w, const Source& s, T* out, cudaStream_t stream) {
    const auto units = static_cast<uint32_t>(s.rows * s.columns / kUnit);
    const auto grid = static_cast<unsigned>(ceil_div(units, kBlocksThreads));
    const auto kernel = w.blocksize_log2 == 5 ? dequantize_blocks_kernel<T, kNested, true>
                                              : dequantize_blocks_kernel<T, kNested, false>;
    return launch_in_order(
        kernel, grid, kBlocksThreads, 0, stream, w, s, units, reinterpret_cast<uint4*>(out));
}

template <typename T, int kWidth, bool kNested>
cudaError_t launch_vectors(const WeightView& w, const Source& s, T* out, cudaStream_t stream) {
    const auto vectors = static_cast<uint32_t>(s.rows * s.columns / kWidth);
    const auto grid = static_cast<unsigned>(ceil_div(vectors, kVectorsThreads * kVectorsPerThread));
    const auto kernel = s.rows == 1 ? dequantize_vectors_kernel<T, kWidth, kNested, true>
                                    : dequantize_vectors_kernel<T, kWidth, kNested, false>;
    return launch_in_order(
        kernel, grid, kVectorsThreads, 0, stream, w, s, vectors,
        reinterpret_cast<Vector<T, kWidth>*>(out));
}

template <typename T, bool kNested>
cudaError_t launch(const WeightView& w, const Source& s, T* out, cudaStream_t stream) {
    const auto fits = [&](int width) {
        return tiles(s, width) && is_aligned(out, std::min<size_t>(16, width * sizeof(T))) &&
               is_aligned(w.qweight, std::min(16, width / 2));
    };
    if constexpr (sizeof(T) == 2) {
        if (fits(kUnit) && is_aligned(w.codebook, 16))
            return launch_blocks<T, kNested>(w, s, out, stream);
        if (fits(8))
            return launch_vectors<T, 8, kNested>(w, s, out, stream);
    }
    if (fits(4))
        return launch_vectors<T, 4, kNested>(w, s, out, stream);
    const int64_t chunks_per_row = ceil_div(s.columns / 2 + 1, kBytesPerCta);
    const int64_t grid = s.rows * chunks_per_row;
    if (grid > INT32_MAX)
        return cudaErrorInvalidConfiguration;
    return launch_in_order(
        dequantize_scalars_kernel<T, kNested>, static_cast<unsigned>(grid), kScalarsThreads, 0,
        stream, w, s, chunks_per_row, out);
}

template <typename T>
cudaError_t launch(const WeightView& w, const Source& s, void* out, cudaStream_t stream) {
    T* typed = static_cast<T*>(out);
    return w.absmax == nullptr ? launch<T, true>(w, s, typed, stream)
                               : launch<T, false>(w, s, typed, stream);
}

}  // namespace

cudaError_t launch_dequantize_4bit(
    const WeightView& weight,
    const DequantizeWindow& window,
    Dtype dtype,
    void* out,
    cudaStream_t stream) {
    if (window.rows == 0 || window.columns == 0)
        return cudaSuccess;
    const Source source = make_source(weight, window);
    switch (dtype) {
    case Dtype::kBFloat16:
        return launch<__nv_bfloat16>(weight, source, out, stream);
    case Dtype::kFloat16:
        return launch<__half>(weight, source, out, stream);
    case Dtype::kFloat32:
        return launch<float>(weight, source, out, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace lowbit::cuda
