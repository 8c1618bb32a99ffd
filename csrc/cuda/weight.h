// A 4-bit weight as kernels see it: device pointers and sizes, no torch. Host and device code
// include this.
//
//     W[n, k] = codebook[q[n, k]] * absmax[block(n, k)]
//
// Rows (row_blocks): row n occupies ceil(K/2) bytes and ceil(K/blocksize) blocks; the last block
// may be short. Flat: nibbles and blocks run over the N*K elements and may cross rows. Element 2i
// is the high nibble of byte i. With K % blocksize == 0 the two are the same bytes, and such a
// weight is always treated as flat.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

namespace lowbit::cuda {

struct WeightView {
    const uint8_t* qweight;        // packed codes
    const float* codebook;         // [16]
    const float* absmax;           // [blocks], or null: double-quantized
    const uint8_t* absmax_8bit;    // [blocks], null when plain; this and the rest belong together
    const float* nested_absmax;    // [ceil(blocks / nested_blocksize)]
    const float* nested_codebook;  // [256]
    const float* nested_offset;    // [1]
    int64_t N;
    int64_t K;
    bool flat;
    int blocksize_log2;
    int nested_blocksize_log2;
};

}  // namespace lowbit::cuda
