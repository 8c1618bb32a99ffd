// Division by numbers that only the host knows, and equal pieces, whose bounds need it. The device
// takes about 25 instructions, each waiting for the one before, for `/` in 32 bits, and several
// times as many in 64: as long as a load from L2, and a kernel's first loads wait for some of them.
#pragma once

#include <cstdint>

namespace lowbit::cuda {

// Three instructions. Exact for 0 <= n < 2^31.
struct Divisor {
    uint32_t multiplier;  // 2^(31 + shift) / divisor, rounded up
    int shift;
};

// Rounded up; exact for powers of two, on which all who shift by it rely.
inline int log2_of(int64_t n) {
    int log2 = 0;
    while (int64_t{1} << log2 < n)
        log2++;
    return log2;
}

// divisor > 0.
inline Divisor make_divisor(int divisor) {
    const int shift = log2_of(divisor);
    const uint64_t product = uint64_t{1} << (31 + shift);
    return {static_cast<uint32_t>((product + divisor - 1) / divisor), shift};
}

__host__ __device__ inline int divide(int n, const Divisor& by) {
    const uint64_t product = uint64_t{2 * static_cast<uint32_t>(n)} * by.multiplier;
    return static_cast<int>(static_cast<uint32_t>(product >> 32) >> by.shift);
}

// `total` units cut into pieces as equal as they can be: piece i begins with unit total * i /
// pieces, rounded down. 0 < total < 2^31 and 0 < pieces < 2^15; their product may be larger.
struct EqualPieces {
    int each, rest;  // total / pieces, total % pieces
    int longest;
    Divisor by_pieces, by_longest;

    __host__ __device__ int begin(int piece) const {
        return each * piece + divide(rest * piece, by_pieces);
    }

    // The piece that has `unit`, which does not lie behind the beginning of `piece`. No step of the
    // loop where all pieces are equal, and few where they are not.
    __host__ __device__ int piece_before(int piece, int unit) const {
        piece -= divide(begin(piece) - unit + longest - 1, by_longest);
        while (begin(piece) > unit)
            piece--;
        return piece;
    }
};

inline EqualPieces cut_evenly(int total, int pieces) {
    const int each = total / pieces, rest = total % pieces, longest = each + (rest > 0);
    return {each, rest, longest, make_divisor(pieces), make_divisor(longest)};
}

}  // namespace lowbit::cuda
