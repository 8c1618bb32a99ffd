// Second quantization: the fp32 scales of a 4-bit weight to 8 bits each.
//
//     c = absmax - offset         a2 = max |c| over nested_blocksize scales
//     x = c * (1 / max(a2, floor))         code = nearest codebook entry to x, ties to the even
//     code
//
// That is code = #{j : x > t_j} with t_j the fp32 midpoint of entries j and (j + 1), one step lower
// for odd j. The 255 thresholds make a full binary tree; it is kept in heap order
// (children of node i at 2i and 2i + 1), so eight branch-free steps end at node 256 + code.
// Portable code only: this is 1/64 of the elements, about 1 ms per 2^18 scales.

#include <cmath>
#include <limits>

#include "quantize.h"

namespace lowbit::cpu {
namespace {

constexpr float kFloor = 1e-38f;  // ABSMAX_FLOOR of lowbit/reference.py
constexpr int kCodes = 256, kLevels = 8;
constexpr int kLanes = 8;  // independent searches in flight, to hide the latency of the loads

struct Tree {
    float node[kCodes];  // [0] unused

    explicit Tree(const float* codebook) {
        float thresholds[kCodes - 1];
        for (int j = 0; j < kCodes - 1; ++j) {
            const float middle = (codebook[j] + codebook[j + 1]) * 0.5f;
            const float below = std::nextafter(middle, -std::numeric_limits<float>::infinity());
            thresholds[j] = j % 2 == 1 ? below : middle;
        }
        node[0] = 0.0f;
        fill(thresholds, 0, kCodes - 1, 1);
    }

    void fill(const float* thresholds, int first, int last, int at) {
        if (first >= last)
            return;
        const int middle = (first + last) / 2;
        node[at] = thresholds[middle];
        fill(thresholds, first, middle, 2 * at);
        fill(thresholds, middle + 1, last, 2 * at + 1);
    }
};

void find_codes(const Tree& tree, const float* x, int count, uint8_t* codes) {
    int at[kLanes];
    for (int i = 0; i < kLanes; ++i)
        at[i] = 1;
    for (int level = 0; level < kLevels; ++level) {
        for (int i = 0; i < kLanes; ++i)
            at[i] = 2 * at[i] + (x[i] > tree.node[at[i]]);
    }
    for (int i = 0; i < count; ++i)
        codes[i] = static_cast<uint8_t>(at[i] - kCodes);
}

void quantize_nested_block(const QuantizeAbsmaxArgs& args, const Tree& tree, int64_t nested) {
    const int64_t first = nested * args.nested_blocksize, left = args.blocks - first;
    const int64_t count = left < args.nested_blocksize ? left : args.nested_blocksize;
    const float* absmax = args.absmax + first;
    uint32_t largest = 0;  // bits of |c|: NaN is above everything and reaches nested_absmax
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = bits_from_float(absmax[i] - args.offset) & 0x7FFFFFFFu;
        largest = bits > largest ? bits : largest;
    }
    const float a2 = float_from_bits(largest);
    args.nested_absmax[nested] = a2;
    const float inverse = 1.0f / (a2 > kFloor ? a2 : kFloor);
    for (int64_t i = 0; i < count; i += kLanes) {
        float x[kLanes] = {};
        const int lanes = static_cast<int>(count - i < kLanes ? count - i : kLanes);
        for (int j = 0; j < lanes; ++j)
            x[j] = (absmax[i + j] - args.offset) * inverse;
        find_codes(tree, x, lanes, args.codes + first + i);
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
