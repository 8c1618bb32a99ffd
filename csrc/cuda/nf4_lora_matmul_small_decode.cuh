// From codes to operands in nf4_lora_matmul_small_sm90.cu.
#pragma once

#include "common.cuh"
#include "nf4_lora_matmul_small_tile.cuh"

namespace lowbit::cuda {
namespace {

// A block of two rows, 32 bytes each, to the operands of four products of 16 columns. Lane t of a
// quad wants columns 2 t, 2 t + 1 and 8 + those: byte t of each word, so all four lanes read the
// same words. `at` is the first row's place under the 64-byte swizzle, where the second row's
// chunks have changed places; lane_bits 4 lane and the upper half of addresses in shared memory;
// select makes prmt take byte t as the number of the table's entry.
__device__ __forceinline__ void
decode_block(uint32_t (&a)[16], uint32_t at, uint32_t lane_bits, uint32_t select) {
    const auto look_up = [&](uint32_t word) {
        return load_shared_at<kSharedStart>(prmt(word, lane_bits, select));
    };
#pragma unroll
    for (int s = 0; s < 4; s++) {
        const uint32_t chunk = 16 * (s / 2), words = s % 2 * 8;
        const uint2 low = load_shared_pair((at ^ chunk) + words);
        const uint2 high = load_shared_pair((at ^ (16 - chunk)) + 128 + words);
        uint32_t* const out = a + 4 * s;
        out[0] = look_up(low.x), out[1] = look_up(high.x);
        out[2] = look_up(low.y), out[3] = look_up(high.y);
    }
}

}  // namespace
}  // namespace lowbit::cuda
