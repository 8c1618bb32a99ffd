// State of the optimizers in a slab: fp32 values, or 8-bit codes with a scale per block of 256.
//
//     load:  x = codebook[code] * scale          store:  scale = max |x|,
//                                                        code = #{j : x / scale > thresholds[j]}
//
// A binary search over 255 thresholds would be 8 reads of shared memory, most of them conflicts of
// 4 to 8 lanes on a bank: it made AdamW over 800 M elements take 8.8 instead of 3.8 ms (H100,
// 2026-11). So x / scale, by its exponent and leading mantissa bits, picks a cell that holds at
// most one threshold of the dynamic codebooks (tests/test_optim.py): the cell's code and one
// comparison give the same answer.
#pragma once

#include "optimizer_elements.cuh"

namespace lowbit::cuda {

constexpr int kCodes = 256;

// ---- cells --------------------------------------------------------------------------------------

// The cells of state 0 (signed, 64 cells per power of two and sign) or 1 (not negative, 128 cells).
// The first covers all below 2^-23, where no threshold is, the last all from 1 on.
template <int kState>
struct Cells {
    static constexpr bool kSigned = kState == 0;
    static constexpr int kShift = kSigned ? 17 : 16;
    static constexpr int kFirst = (127 - 23) << (23 - kShift);
    static constexpr int kTop = 23 << (23 - kShift);
    static constexpr int kCount = kSigned ? 2 * (kTop + 1) : kTop + 1;

    // Grows with x; x is not NaN.
    static __device__ __forceinline__ int of(float x) {
        const int bits = __float_as_int(kSigned ? fabsf(x) : x);
        const int cell = max(0, min((bits >> kShift) - kFirst, kTop));
        if constexpr (kSigned)
            return __float_as_int(x) < 0 ? kTop - cell : kTop + 1 + cell;
        return cell;
    }
};

constexpr int kMostCells =
    Cells<0>::kCount > Cells<1>::kCount ? Cells<0>::kCount : Cells<1>::kCount;

// What a CTA needs to decode and encode one state; 5 KiB.
struct StateTables {
    float codebook[kCodes], thresholds[kCodes];  // the last threshold is +inf
    uint8_t first_code[kMostCells];              // of each cell
};

// By a whole CTA of kCodes threads or more, each for the cells between two thresholds; the caller
// synchronizes afterwards. `from` is [2, kCodes].
template <int kState>
__device__ __forceinline__ void fill_tables(StateTables& tables, const float* from) {
    const int code = threadIdx.x;
    if (code >= kCodes)
        return;
    tables.codebook[code] = from[code];
    tables.thresholds[code] = from[kCodes + code];
    const int begin = code == 0 ? -1 : Cells<kState>::of(from[kCodes + code - 1]);
    const int end =
        code == kCodes - 1 ? Cells<kState>::kCount - 1 : Cells<kState>::of(from[kCodes + code]);
    for (int cell = begin + 1; cell <= end; cell++)
        tables.first_code[cell] = static_cast<uint8_t>(code);
}

template <int kState>
__device__ __forceinline__ uint32_t code_of(const StateTables& tables, float x) {
    const uint32_t code = tables.first_code[Cells<kState>::of(x)];
    return add_if_above(code, x, tables.thresholds[code]);
}

// The same for any x; 0 for NaN, as comparisons say.
__device__ __forceinline__ uint32_t search_code(const StateTables& tables, float x) {
    uint32_t code = 0;
#pragma unroll 1
    for (int step = kCodes / 2; step > 0; step /= 2)
        code += x > tables.thresholds[code + step - 1] ? step : 0;
    return code;
}

// ---- fp32 ---------------------------------------------------------------------------------------

struct Float32State {
    static constexpr bool kCoded = false;
    static constexpr int kCtasPerSm = 3;

    // A lane's share of a block.
    template <int kState>
    struct Block {
        Raw<float> raw;

        static __device__ __forceinline__ float* at(const StepArgs& a, int64_t block) {
            return static_cast<float*>(a.values) + kState * a.elements + block * kStateBlock;
        }
        __device__ __forceinline__ void load(const StepArgs& a, int64_t block, int lane) {
            raw = load_block(at(a, block), lane);
        }
        __device__ __forceinline__ void decode(const StateTables*, float (&x)[kPerLane]) const {
            raw.to_floats(x);
        }
        static __device__ __forceinline__ void store(
            const StepArgs& a,
            int64_t block,
            int lane,
            const StateTables*,
            const float (&x)[kPerLane]) {
            store_block(at(a, block), lane, x);
        }
    };
};

// ---- 8-bit --------------------------------------------------------------------------------------

struct CodedState {
    static constexpr bool kCoded = true;
    static constexpr int kCtasPerSm = 3;  // 80 registers: more CTAs spill, fewer are slower

    template <int kState>
    struct Block {
        uint32_t word[kHalves];  // four codes each
        float scale;

        static __device__ __forceinline__ uint32_t* at(const StepArgs& a, int64_t block) {
            auto* codes = static_cast<uint8_t*>(a.values) + kState * a.elements;
            return reinterpret_cast<uint32_t*>(codes + block * kStateBlock);
        }
        static __device__ __forceinline__ float* scale_at(const StepArgs& a, int64_t block) {
            return a.scales + kState * (a.elements / kStateBlock) + block;
        }

        __device__ __forceinline__ void load(const StepArgs& a, int64_t block, int lane) {
            scale = *scale_at(a, block);
#pragma unroll
            for (int half = 0; half < kHalves; half++)
                word[half] = __ldcs(at(a, block) + half * kWarpSize + lane);
        }

        __device__ __forceinline__ void
        decode(const StateTables* tables, float (&x)[kPerLane]) const {
#pragma unroll
            for (int i = 0; i < kPerLane; i++) {
                const uint32_t code = (word[i / kQuad] >> (8 * (i % kQuad))) & 0xff;
                x[i] = __fmul_rn(tables[kState].codebook[code], scale);
            }
        }

        static __device__ __forceinline__ void store(
            const StepArgs& a,
            int64_t block,
            int lane,
            const StateTables* tables,
            const float (&x)[kPerLane]) {
            float largest = fabsf(x[0]);
#pragma unroll
            for (int i = 1; i < kPerLane; i++)
                largest = max_nan(largest, fabsf(x[i]));
            largest = group_max(largest, kWarpSize);
            if (lane == 0)
                *scale_at(a, block) = largest;
            const float inverse = reciprocal(largest);
            uint32_t codes[kPerLane];
            if (largest < __uint_as_float(0x7f800000)) {
#pragma unroll
                for (int i = 0; i < kPerLane; i++)
                    codes[i] = code_of<kState>(tables[kState], __fmul_rn(x[i], inverse));
            } else {
#pragma unroll
                for (int i = 0; i < kPerLane; i++)
                    codes[i] = search_code(tables[kState], __fmul_rn(x[i], inverse));
            }
            uint32_t packed[kHalves] = {};
#pragma unroll
            for (int i = 0; i < kPerLane; i++) {
                // A square that became 0 would turn the next update into m / eps.
                if (kState == 1 && x[i] > 0.0f)
                    codes[i] = max(codes[i], 1u);
                packed[i / kQuad] |= codes[i] << (8 * (i % kQuad));
            }
#pragma unroll
            for (int half = 0; half < kHalves; half++)
                __stcs(at(a, block) + half * kWarpSize + lane, packed[half]);
        }
    };
};

}  // namespace lowbit::cuda
