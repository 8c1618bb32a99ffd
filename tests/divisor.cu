// Compares csrc/cuda/divisor.h with plain division on the host, and ends with 1 and a line at the
// first quotient or piece that is wrong. See test_plans.py.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "cuda/divisor.h"

using namespace lowbit::cuda;

namespace {

constexpr uint32_t kMost = 0x7fffffff;

// Quotients around multiples of the divisor, and those of any numbers.
void check_division(std::mt19937& random) {
    for (int i = 0; i < 100000; i++) {
        const auto divisor = static_cast<uint32_t>(1 + random() % (kMost >> i % 31));
        const Divisor by = make_divisor(static_cast<int>(divisor));
        const uint32_t multiple = kMost / divisor * divisor;
        for (const uint32_t n :
             {multiple - 1, multiple, kMost, static_cast<uint32_t>(random() % kMost)}) {
            if (divide(static_cast<int>(n), by) == static_cast<int>(n / divisor))
                continue;
            std::printf("%u / %u is wrong\n", n, divisor);
            std::exit(1);
        }
    }
}

// Where pieces begin, and which one has a unit. Returns how often they were unequal.
int check_pieces(std::mt19937& random) {
    int unequal = 0;
    for (int i = 0; i < 20000; i++) {
        const auto total = static_cast<int>(1 + random() % (kMost >> random() % 31));
        const auto count = static_cast<int>(1 + random() % std::min(total, 1 << random() % 15));
        const EqualPieces pieces = cut_evenly(total, count);
        const auto begin = [&](int piece) {
            return static_cast<int>(int64_t{total} * piece / count);
        };
        const auto piece = static_cast<int>(random() % count);
        const auto unit = static_cast<int>(random() % (int64_t{begin(piece)} + 1));
        int first = piece;
        while (begin(first) > unit)
            first--;
        if (pieces.begin(piece) != begin(piece) || pieces.begin(count) != total ||
            pieces.piece_before(piece, unit) != first) {
            std::printf("piece %d of %d, of %d units; unit %d\n", piece, count, total, unit);
            std::exit(1);
        }
        unequal += pieces.rest > 0;
    }
    return unequal;
}

}  // namespace

int main() {
    std::mt19937 random(0);
    check_division(random);
    std::printf("%d\n", check_pieces(random));
}
