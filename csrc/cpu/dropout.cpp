// Inverted dropout: dispatch, threading, and the portable kernel (dropout_kernel.h has the
// formula).

#include "dropout_kernel.h"

namespace lowbit::cpu {
namespace {

struct GenericOps {
    static constexpr int64_t kUnit = 4;
    template <typename T>
    static void unit(const T* x, T* out, uint64_t counter, const DropoutParameters& parameters) {
        dropout_scalar(x, out, 4 * counter, kUnit, parameters);
    }
};

}  // namespace

void dropout_range(
    const void* x, Dtype dtype, int64_t first, int64_t count, const DropoutArgs& args, void* out) {
    const uint64_t index = static_cast<uint64_t>(first);
#if LOWBIT_CPU_X86
    const Isa isa = current_isa();
    if (isa >= Isa::kAvx512)
        return dropout_avx512(x, dtype, index, count, args, out);
    if (isa >= Isa::kAvx2)
        return dropout_avx2(x, dtype, index, count, args, out);
#endif
    dropout_with<GenericOps>(x, dtype, index, count, args, out);
}

void launch_dropout(const void* x, Dtype dtype, int64_t count, const DropoutArgs& args, void* out) {
    // Elements per piece: a multiple of every unit, so that only the last piece has a ragged end.
    constexpr int64_t kPiece = 4096;
    const int64_t bytes = element_size(dtype);
    parallel_for(0, ceil_div(count, kPiece), 2, [&](int64_t first_piece, int64_t last_piece) {
        const int64_t first = first_piece * kPiece;
        const int64_t last = min64(last_piece * kPiece, count);
        dropout_range(
            static_cast<const char*>(x) + first * bytes, dtype, first, last - first, args,
            static_cast<char*>(out) + first * bytes);
    });
}

}  // namespace lowbit::cpu
