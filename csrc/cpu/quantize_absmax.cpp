// Second quantization: the fp32 scales of a 4-bit weight to 8 bits each.
//
//     c = absmax - offset                      a2 = max |c| over nested_blocksize scales
//     x = c * (1 / max(a2, floor))             code = nearest codebook entry to x, ties to even
//
// That is code = #{j : x > t_j} with t_j the fp32 midpoint of entries j and (j + 1), one step lower
// for odd j. The 255 thresholds make a full binary tree; it is kept in heap order
// (children of node i at 2i and 2i + 1), so eight branch-free steps end at node 256 + code.
// Portable code only: this is 1/64 of the elements, 1.5 ms per 2^18 scales on one core.

#include <cmath>
#include <limits>

#include "quantize.h"

namespace lowbit::cpu {
namespace {

constexpr int kCodes = 256, kLevels = 8, kLanes = 4;

// Integers that order like the floats (adding 0 makes -0 and +0 the same). GCC turns a search that
// compares floats into branches, which mispredict every other time; of integers it makes none.
inline int32_t ordered(float value) {
    const int32_t bits = static_cast<int32_t>(bits_from_float(value + 0.0f));
    return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

struct Tree {
    int32_t node[kCodes];  // [0] unused

    explicit Tree(const float* codebook) {
        float thresholds[kCodes - 1];
        for (int j = 0; j < kCodes - 1; ++j) {
            const float middle = (codebook[j] + codebook[j + 1]) * 0.5f;
            const float below = std::nextafter(middle, -std::numeric_limits<float>::infinity());
            thresholds[j] = j % 2 == 1 ? below : middle;
        }
        node[0] = 0;
        fill(thresholds, 0, kCodes - 1, 1);
    }

    // Codes of kLanes scales. A search is a chain of loads; the lanes overlap.
    void find(const float* absmax, float offset, float inverse, uint8_t* codes) const {
        int32_t key[kLanes];
        size_t at[kLanes];
        for (int j = 0; j < kLanes; ++j) {
            key[j] = ordered((absmax[j] - offset) * inverse);
            at[j] = 1;
        }
        for (int level = 0; level < kLevels; ++level) {
            for (int j = 0; j < kLanes; ++j)
                at[j] = 2 * at[j] + static_cast<size_t>(key[j] > node[at[j]]);
        }
        for (int j = 0; j < kLanes; ++j)
            codes[j] = static_cast<uint8_t>(at[j] - kCodes);
    }

    void fill(const float* thresholds, int first, int last, int at) {
        if (first >= last)
            return;
        const int middle = (first + last) / 2;
        node[at] = ordered(thresholds[middle]);
        fill(thresholds, first, middle, 2 * at);
        fill(thresholds, middle + 1, last, 2 * at + 1);
    }
};

void quantize_nested_block(const QuantizeAbsmaxArgs& args, const Tree& tree, int64_t nested) {
    const int64_t first = nested * args.nested_blocksize;
    const int64_t count = min64(args.nested_blocksize, args.blocks - first);
    const float* absmax = args.absmax + first;
    int32_t largest = 0;  // bits of |c|: NaN is above everything and reaches nested_absmax
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = bits_from_float(absmax[i] - args.offset) & 0x7FFFFFFFu;
        largest = static_cast<int32_t>(bits) > largest ? static_cast<int32_t>(bits) : largest;
    }
    const float a2 = float_from_bits(static_cast<uint32_t>(largest));
    args.nested_absmax[nested] = a2;
    const float inverse = reciprocal(a2);
    const int64_t full = count - count % kLanes;
    for (int64_t i = 0; i < full; i += kLanes)
        tree.find(absmax + i, args.offset, inverse, args.codes + first + i);
    if (full < count) {
        float rest[kLanes] = {};
        uint8_t codes[kLanes];
        std::memcpy(rest, absmax + full, (count - full) * sizeof(float));
        tree.find(rest, args.offset, inverse, codes);
        std::memcpy(args.codes + first + full, codes, count - full);
    }
}

}  // namespace

void launch_quantize_absmax(const QuantizeAbsmaxArgs& args) {
    const Tree tree(args.nested_codebook);
    const int64_t nested_blocks = ceil_div(args.blocks, args.nested_blocksize);
    constexpr int64_t kGrainBlocks = 4096;  // scales worth waking a thread for
    parallel_for(
        0, nested_blocks, ceil_div(kGrainBlocks, args.nested_blocksize),
        [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i)
                quantize_nested_block(args, tree, i);
        });
}

}  // namespace lowbit::cpu
