// Warpgroup products of sm_90a, and the descriptors of their operands in shared memory.
//
//     d = a b^T (+ d if `accumulate`),  a [64, 16], b [columns, 16], columns = 2 size(d)
//
// in bf16 or fp16 (the last argument says which) with fp32 sums. d[4 j + 2 h + e] of a thread is
// row 16 (warp % 4) + lane / 4 + 8 h, column 8 j + 2 (lane % 4) + e. b lies in shared memory; a
// does too, or is in four registers, as mma_16x8x16 has it for the 16 rows of each warp.
#pragma once

#include "ptx_sm90.cuh"

namespace lowbit::cuda {

// Operand with its contraction axis contiguous: rows of 128 bytes, 16-byte chunk c of row i at
// c ^ (i % 8), groups of 8 rows 1024 bytes apart; 1024-byte aligned. Steps of 16 elements along the
// contraction add 2 to the descriptor.
constexpr uint64_t kOperandLayout =
    uint64_t{1} << 16 | uint64_t{1024 / 16} << 32 | uint64_t{1} << 62;

__device__ __forceinline__ uint64_t operand_descriptor(uint32_t address) {
    return (address & 0x3ffff) >> 4 | kOperandLayout;
}

// The same with one instruction less, for an address that is known to be in the CTA's own window.
__device__ __forceinline__ uint64_t own_operand_descriptor(uint32_t address) {
    return address >> 4 | kOperandLayout;
}

// For wgmma_transposed, whose a has its 64 rows contiguous, wgmma_transposed_b, whose b has its 64
// columns so, and wgmma_both_transposed: line i of 128 bytes, swizzled as above, has element i of
// the contraction; 1024-byte aligned. 8 lines are 1024 bytes, whichever of the two strides they
// count as. A product's share of the contraction is 16 lines, which add kLines16.
constexpr uint64_t kLines16 = 16 * 128 / 16;

__device__ __forceinline__ uint64_t transposed_operand_descriptor(uint32_t address) {
    constexpr uint64_t kLayout =
        uint64_t{1024 / 16} << 16 | uint64_t{1024 / 16} << 32 | uint64_t{1} << 62;
    return (address & 0x3ffff) >> 4 | kLayout;
}

// clang-format off

// Names of registers, and the operands that they are.
#define LOWBIT_R4 "%0,%1,%2,%3"
#define LOWBIT_R8 LOWBIT_R4 ",%4,%5,%6,%7"
#define LOWBIT_R16 LOWBIT_R8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define LOWBIT_R32 LOWBIT_R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LOWBIT_R64 LOWBIT_R32                                                                      \
    ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"                             \
    ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define LOWBIT_R128 LOWBIT_R64                                                                     \
    ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"                             \
    ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"                             \
    ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"                 \
    ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define LOWBIT_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LOWBIT_D8(i) LOWBIT_D4(i), LOWBIT_D4(i + 4)
#define LOWBIT_D16(i) LOWBIT_D8(i), LOWBIT_D8(i + 8)
#define LOWBIT_D32(i) LOWBIT_D16(i), LOWBIT_D16(i + 16)
#define LOWBIT_D64(i) LOWBIT_D32(i), LOWBIT_D32(i + 32)
#define LOWBIT_D128(i) LOWBIT_D64(i), LOWBIT_D64(i + 64)

// Both operands by descriptor, transposed if A_IS, B_IS are 1. COUNT = COLUMNS / 2; A, B, P number
// the operands after d.
#define LOWBIT_WGMMA(FUNCTION, A_IS, B_IS, TYPE, NAME, COLUMNS, COUNT, A, B, P)                    \
    __device__ __forceinline__ void                                                                \
    FUNCTION(float (&d)[COUNT], uint64_t a, uint64_t b, bool accumulate, TYPE) {                   \
        asm volatile("{.reg .pred p;\n\tsetp.ne.b32 p, %" #P ", 0;\n\t"                            \
                     "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." NAME "." NAME         \
                     " {" LOWBIT_R##COUNT "}, %" #A ", %" #B ", p, 1, 1, " #A_IS ", " #B_IS ";}"   \
                     : LOWBIT_D##COUNT(0)                                                          \
                     : "l"(a), "l"(b), "r"(int{accumulate}));                                      \
    }

// a in registers.
#define LOWBIT_WGMMA_A(TYPE, NAME, COLUMNS, COUNT, A0, A1, A2, A3, B, P)                           \
    __device__ __forceinline__ void                                                                \
    wgmma(float (&d)[COUNT], const uint32_t* a, uint64_t b, bool accumulate, TYPE) {               \
        asm volatile("{.reg .pred p;\n\tsetp.ne.b32 p, %" #P ", 0;\n\t"                            \
                     "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." NAME "." NAME         \
                     " {" LOWBIT_R##COUNT "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B      \
                     ", p, 1, 1, 0;}"                                                              \
                     : LOWBIT_D##COUNT(0)                                                          \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{accumulate}));  \
    }

#define LOWBIT_WGMMAS(TYPE, NAME)                                                                  \
    LOWBIT_WGMMA(wgmma, 0, 0, TYPE, NAME, 8, 4, 4, 5, 6)                                           \
    LOWBIT_WGMMA(wgmma, 0, 0, TYPE, NAME, 16, 8, 8, 9, 10)                                         \
    LOWBIT_WGMMA(wgmma, 0, 0, TYPE, NAME, 32, 16, 16, 17, 18)                                      \
    LOWBIT_WGMMA(wgmma, 0, 0, TYPE, NAME, 64, 32, 32, 33, 34)                                      \
    LOWBIT_WGMMA(wgmma, 0, 0, TYPE, NAME, 128, 64, 64, 65, 66)                                     \
    LOWBIT_WGMMA(wgmma_transposed, 1, 0, TYPE, NAME, 16, 8, 8, 9, 10)                              \
    LOWBIT_WGMMA(wgmma_transposed, 1, 0, TYPE, NAME, 128, 64, 64, 65, 66)                          \
    LOWBIT_WGMMA(wgmma_transposed_b, 0, 1, TYPE, NAME, 64, 32, 32, 33, 34)                         \
    LOWBIT_WGMMA(wgmma_both_transposed, 1, 1, TYPE, NAME, 64, 32, 32, 33, 34)                      \
    LOWBIT_WGMMA(wgmma, 0, 0, TYPE, NAME, 256, 128, 128, 129, 130)                                 \
    LOWBIT_WGMMA(wgmma_transposed, 1, 0, TYPE, NAME, 256, 128, 128, 129, 130)                      \
    LOWBIT_WGMMA_A(TYPE, NAME, 8, 4, 4, 5, 6, 7, 8, 9)                                             \
    LOWBIT_WGMMA_A(TYPE, NAME, 16, 8, 8, 9, 10, 11, 12, 13)                                        \
    LOWBIT_WGMMA_A(TYPE, NAME, 32, 16, 16, 17, 18, 19, 20, 21)                                     \
    LOWBIT_WGMMA_A(TYPE, NAME, 64, 32, 32, 33, 34, 35, 36, 37)
LOWBIT_WGMMAS(__nv_bfloat16, "bf16")
LOWBIT_WGMMAS(__half, "f16")

#undef LOWBIT_WGMMAS
#undef LOWBIT_WGMMA_A
#undef LOWBIT_WGMMA
#undef LOWBIT_D128
#undef LOWBIT_D64
#undef LOWBIT_D32
#undef LOWBIT_D16
#undef LOWBIT_D8
#undef LOWBIT_D4
#undef LOWBIT_R128
#undef LOWBIT_R64
#undef LOWBIT_R32
#undef LOWBIT_R16
#undef LOWBIT_R8
#undef LOWBIT_R4
// clang-format on

}  // namespace lowbit::cuda
