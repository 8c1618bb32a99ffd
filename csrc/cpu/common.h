// What the CPU kernels share: element types, the view of a quantized weight, decoding of block
// scales, the thread pool.
//
// Included by files built for different instruction sets, so everything here has internal linkage
// (isa.h says why) and nothing includes torch. bindings.h turns tensors into the structs of this
// file.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"
#include "isa.h"

namespace lowbit::cpu {

// 16-bit storage types: distinct C++ types so that templates can tell them apart.
struct bf16_t {
    uint16_t bits;
};
struct fp16_t {
    uint16_t bits;
};

// The frozen weight W [N, K] of every operator: 4-bit (qweight, codebook, one of the two absmax
// pointers) or dense.
//
//     W[n, k] = codebook[index(n, k)] * absmax(block(n, k))
//
// element i of a row (row_blocks) or of the flattened tensor (not row_blocks) sits in byte i / 2,
// the even one in the high nibble.
struct WeightView {
    const uint8_t* qweight;        // packed nibbles; null when dense
    const void* dense;             // [N, K] of dense_dtype; null when 4-bit
    Dtype dense_dtype;             // meaningful when dense
    const float* codebook;         // [16], any order
    const float* absmax;           // [nblocks]; null when double-quantized
    const uint8_t* absmax_8bit;    // [nblocks]; null when not double-quantized
    const float* nested_absmax;    // [ceil(nblocks / nested_blocksize)], with absmax_8bit
    const float* nested_codebook;  // [256], with absmax_8bit
    float nested_offset;           // with absmax_8bit
    int64_t N, K;
    int64_t blocksize, nested_blocksize;  // powers of two; nested_blocksize 0 without absmax_8bit
    int blocksize_log2, nested_blocksize_log2;
    bool row_blocks;         // every row starts a new byte and a new block
    int64_t row_bytes;       // row_blocks: ceil(K / 2); else 0
    int64_t blocks_per_row;  // row_blocks: ceil(K / blocksize); else 0

    LOWBIT_INLINE bool is_dense() const {
        return dense != nullptr;
    }
    LOWBIT_INLINE int64_t num_blocks() const {
        return row_blocks ? N * blocks_per_row : (N * K + blocksize - 1) >> blocksize_log2;
    }
};

// The functions below are static: see isa.h about linkage.

static inline int64_t min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}
static inline int64_t max64(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static inline int64_t element_size(Dtype type) {
    return type == Dtype::kFloat32 ? 4 : 2;
}

// fn(element) with an element of the C++ type that `type` names.
template <typename F>
static inline void with_type(Dtype type, const F& fn) {
    switch (type) {
    case Dtype::kFloat32:
        return fn(float{});
    case Dtype::kBFloat16:
        return fn(bf16_t{});
    case Dtype::kFloat16:
        return fn(fp16_t{});
    }
}

static inline float float_from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

static inline uint32_t bits_from_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

static inline float to_float(float value) {
    return value;
}

static inline float to_float(bf16_t value) {
    return float_from_bits(uint32_t{value.bits} << 16);
}

static inline float to_float(fp16_t value) {
    const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
    const uint32_t magnitude = value.bits & 0x7FFFu;
    if (magnitude >= 0x7C00u) {  // Inf, NaN (made quiet, as the F16C instruction does)
        const uint32_t mantissa = magnitude & 0x3FFu;
        return float_from_bits(sign | 0x7F800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0u));
    }
    if (magnitude < 0x0400u) {  // zero and subnormal: an integer multiple of 2^-24, exact in fp32
        const float value_abs = static_cast<float>(magnitude) * 0x1p-24f;
        return float_from_bits(sign | bits_from_float(value_abs));
    }
    return float_from_bits(sign | ((magnitude << 13) + (uint32_t{127 - 15} << 23)));
}

// Round to nearest, ties to even. A NaN becomes the quiet NaN 0x7FC0 whatever its sign and payload.
static inline bf16_t to_bf16(float value) {
    const uint32_t bits = bits_from_float(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u)
        return bf16_t{0x7FC0};
    return bf16_t{static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}

// Round to nearest, ties to even, with subnormals and overflow to Inf; NaNs keep sign and leading
// payload bits, made quiet. The same bits as the F16C instruction, which the vector kernels use.
static inline fp16_t to_fp16(float value) {
    const uint32_t bits = bits_from_float(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    uint32_t half;
    if (magnitude > 0x7F800000u) {
        half = 0x7E00u | ((magnitude >> 13) & 0x1FFu);
    } else if (magnitude >= 0x477FF000u) {  // 65520 and above round to Inf
        half = 0x7C00u;
    } else if (magnitude >= 0x38800000u) {  // normal in fp16: 2^-14 and above
        const uint32_t rebiased = magnitude - (uint32_t{127 - 15} << 23);
        half = (rebiased + 0xFFFu + ((rebiased >> 13) & 1u)) >> 13;
    } else {
        // Adding 0.5 aligns the last mantissa bit of the sum with 2^-24, the step of fp16
        // subnormals, so the fp32 addition does the rounding.
        half = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3F000000u;
    }
    return fp16_t{static_cast<uint16_t>(sign | half)};
}

static inline void store_float(float* out, float value) {
    *out = value;
}
static inline void store_float(bf16_t* out, float value) {
    *out = to_bf16(value);
}
static inline void store_float(fp16_t* out, float value) {
    *out = to_fp16(value);
}

// Scale of one block. Double quantization rounds twice, product then sum: build with
// -ffp-contract=off.
static inline float block_absmax(const WeightView& w, int64_t block) {
    if (w.absmax_8bit == nullptr)
        return w.absmax[block];
    const float product =
        w.nested_codebook[w.absmax_8bit[block]] * w.nested_absmax[block >> w.nested_blocksize_log2];
    return product + w.nested_offset;
}

// Element (n, k) of a 4-bit weight in either layout; the vector decoders read whole bytes.
static inline float element(const WeightView& w, int64_t n, int64_t k) {
    const int64_t i = w.row_blocks ? k : n * w.K + k;  // in the row, or in the tensor
    const uint8_t byte = w.qweight[(w.row_blocks ? n * w.row_bytes : 0) + (i >> 1)];
    const int64_t block = (w.row_blocks ? n * w.blocks_per_row : 0) + (i >> w.blocksize_log2);
    return w.codebook[(i & 1) ? (byte & 0x0F) : (byte >> 4)] * block_absmax(w, block);
}

// fn(begin, end, context) over disjoint ranges that cover [begin, end), on torch's own thread pool
// (torch.set_num_threads holds); serial when called from inside a parallel region. grain = fewest
// iterations worth a thread. Defined in parallel.cpp.
using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
void run_parallel(int64_t begin, int64_t end, int64_t grain, RangeFunction fn, void* context);
int num_threads();

// run_parallel for a callable fn(begin, end). fn must not throw: the call crosses a C interface.
template <typename F>
static inline void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& fn) {
    const auto call = [](int64_t first, int64_t last, void* context) {
        (*static_cast<const F*>(context))(first, last);
    };
    run_parallel(begin, end, grain, call, const_cast<void*>(static_cast<const void*>(&fn)));
}

}  // namespace lowbit::cpu
