// From 4-bit codes to 16-bit values, eight at a time, by byte permutes in registers.
//
//     value = RN_T(codebook[code] * scale)
//
// The 16 values of a block's scale are computed once and split into planes of low and of high
// bytes; a PRMT then looks up four codes in 8 bytes of a plane. 4.7 instructions per code with the
// table, for blocks of 64. The technique follows CUTLASS' lookup_table_convert.
#pragma once

#include "common.cuh"

namespace lowbit::cuda {

struct Codebook {
    float value[16];
};

// From memory on purpose: constants would sit in uniform registers, copied back before each use (+1
// instruction per weight). Not by __ldg: see wait_for_previous_kernel.
__device__ __forceinline__ Codebook load_codebook(const float* codebook) {
    Codebook c;
#pragma unroll
    for (int i = 0; i < 16; i++)
        c.value[i] = codebook[i];
    return c;
}

// 16-byte aligned.
__device__ __forceinline__ Codebook load_aligned_codebook(const float* codebook) {
    Codebook c;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float4 v = __ldg(reinterpret_cast<const float4*>(codebook) + i);
        c.value[4 * i] = v.x, c.value[4 * i + 1] = v.y, c.value[4 * i + 2] = v.z,
                    c.value[4 * i + 3] = v.w;
    }
    return c;
}

// The 16 values of one block in T, split into planes of low and of high bytes, 4 codes per word.
// kConstantInRegister: see decode_word.
template <bool kConstantInRegister = false>
struct ScaledTable {
    uint32_t low[4];
    uint32_t high[4];
};

template <>
struct ScaledTable<true> : ScaledTable<false> {
    uint32_t quarters;
};

// Twice i % 4 in nibble i.
constexpr uint32_t kQuarters = 0x64206420;

template <typename T, bool kConstantInRegister = false>
__device__ __forceinline__ ScaledTable<kConstantInRegister>
scale_codebook(const Codebook& c, float scale) {
    ScaledTable<kConstantInRegister> t;
    if constexpr (kConstantInRegister)
        asm volatile("mov.b32 %0, %1;" : "=r"(t.quarters) : "n"(kQuarters));
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float* v = c.value + 4 * i;
        const uint32_t first = pack_pair(__fmul_rn(v[0], scale), __fmul_rn(v[1], scale), T{});
        const uint32_t second = pack_pair(__fmul_rn(v[2], scale), __fmul_rn(v[3], scale), T{});
        t.low[i] = prmt(first, second, 0x6420);
        t.high[i] = prmt(first, second, 0x7531);
    }
    return t;
}

// Bytes of four codes from one plane: three bits of a code select within each half, the fourth
// between the halves.
__device__ __forceinline__ uint32_t
look_up(const uint32_t (&plane)[4], uint32_t select, uint32_t half) {
    return prmt(prmt(plane[0], plane[1], select), prmt(plane[2], plane[3], select), half);
}

// Eight codes of a word (little endian, first code in the high nibble of byte 0) to eight values.
// kConstantInRegister saves an instruction per word, where a register and a move per table are to
// be had: of a mask and a constant ptxas makes two steps.
template <bool kConstantInRegister>
__device__ __forceinline__ uint4
decode_word(const ScaledTable<kConstantInRegister>& t, uint32_t word) {
    uint32_t select = word & 0x77777777u;
    uint32_t half;  // nibble i, when halved: i % 4, plus 4 where bit 3 of code i is set
    if constexpr (kConstantInRegister)
        asm("lop3.b32 %0, %1, 0x88888888, %2, 0xea;" : "=r"(half) : "r"(word), "r"(t.quarters));
    else
        half = (word & 0x88888888u) | kQuarters;
    half >>= 1;
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const uint32_t low = look_up(t.low, select, half);
        const uint32_t high = look_up(t.high, select, half);
        out[i] = prmt(low, high, 0x4051);  // of two codes in a byte the high nibble comes first
        out[i + 1] = prmt(low, high, 0x6273);
        select >>= 16;
        half >>= 16;
    }
    return {out[0], out[1], out[2], out[3]};
}

}  // namespace lowbit::cuda
