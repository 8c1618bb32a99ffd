// y or dx out of the registers of a consumer warpgroup (nf4_lora_matmul_large_consume.cuh).
//
// 64 rows x 256 tokens in rounds of 32 tokens, each turned in shared memory: two buffers, for one
// barrier per round; ordinary stores, as bulk stores would queue behind the loads of the next tile;
// whole lines of 128 bytes. A warpgroup that stores does not multiply, so the last rounds are kept
// in registers, rounded, and stored between the steps of the next tile.
#pragma once

#include "common.cuh"
#include "nf4_lora_matmul_large_products.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kOutRounds = kTileTokens / kOutTokens;

// Rounds kept, and the steps between their stores: 4 of them, or one after every step, were no
// faster (H100, N = 28672, K = 8192, M = 16384, 2026-11); with 5, or 3 with dx, registers spill.
template <class Product>
constexpr int kHeldRounds = Product::kIsForward ? 3 : 2;
constexpr int kStepsPerHeldRound = 2;

template <typename T, class Product>
class Output {
public:
    __device__ __forceinline__ Output(uint32_t buffers, int group, int thread)
        : group_(group), thread_(thread) {
        // Chunk c of 8 rows of token t lies at c ^ (t % 8): free of bank conflicts both ways. Into
        // it, a lane writes a row of one of four 8x8 tiles: a token, and 8 of the warp's 16 rows.
        // Out of it, 8 lanes read the rows of a token.
        const int warp = thread / 32, lane = thread % 32;
        const int token = lane / 16 * 8 + lane % 8;
        to_ = buffers + token * 128 + ((2 * warp + lane / 8 % 2) ^ lane % 8) * 16;
        from_ = buffers + thread / 8 * 128 + ((thread ^ thread / 8) % 8) * 16;
    }

    // A finished tile; of the tile before it nothing is held any more.
    __device__ __forceinline__ void
    take(const Params& p, const float (&d)[128], int first_row, int first_token) {
        const int64_t rows = p.plan.rows;
        float bias[2] = {0.0f, 0.0f};
        if (Product::kIsForward && p.bias != nullptr) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = first_row + thread_ / 32 * 16 + thread_ % 32 / 4 + h * 8;
                if (row < rows)
                    bias[h] = to_float(__ldg(static_cast<const T*>(p.bias) + row));
            }
        }
        token_ = first_token + thread_ / 8;
        row_ = first_row + thread_ % 8 * 8;
        auto pack = [&](uint32_t (&words)[8], const float* v) {
#pragma unroll
            for (int i = 0; i < 8; i++)
                words[i] = pack_pair(v[2 * i] + bias[i % 2], v[2 * i + 1] + bias[i % 2], T{});
        };
#pragma unroll
        for (int i = 0; i < kOutRounds - kHeld; i++) {
            uint32_t words[8];
            pack(words, d + 16 * i);
            store(p, i, words);
        }
#pragma unroll
        for (int i = 0; i < kHeld; i++)
            pack(held_words_[i], d + 16 * (kOutRounds - kHeld + i));
        holds_ = true;
    }

    // While products of the k-th step of the next tile are under way.
    __device__ __forceinline__ void store_between_steps(const Params& p, int k) {
        if (!holds_)
            return;
#pragma unroll
        for (int i = 0; i < kHeld; i++)
            if (k == (i + 1) * kStepsPerHeldRound)
                store(p, kOutRounds - kHeld + i, held_words_[i]);
        if (k == kHeld * kStepsPerHeldRound)
            holds_ = false;
    }

    // At once what would be stored from the k-th step on.
    __device__ __forceinline__ void store_held(const Params& p, int k) {
        for (; holds_; k++)
            store_between_steps(p, k);
    }

private:
    static constexpr int kHeld = kHeldRounds<Product>;

    __device__ __forceinline__ void
    store(const Params& p, int round, const uint32_t (&words)[8]) const {
        const int64_t rows = p.plan.rows;
        const uint32_t buffer = round % kOutBuffers * kOutBytes;
#pragma unroll
        for (int i = 0; i < kOutTokens / 16; i++)
            store_matrices_transposed(
                to_ + buffer + i * (16 * 128), words[4 * i], words[4 * i + 1], words[4 * i + 2],
                words[4 * i + 3]);
        named_barrier(kGroupBarrier + group_, 128);
#pragma unroll
        for (int i = 0; i < kOutTokens / 16; i++) {
            const uint4 line = load_shared(from_ + buffer + i * (16 * 128));
            const int token = token_ + round * kOutTokens + i * 16;
            if (token >= p.plan.M || row_ >= rows)  // rows: a multiple of 8
                continue;
            T* y = static_cast<T*>(p.y) + token * rows + row_;
            if (!Product::kIsForward && p.adds)
                add_to_memory(y, line, T{});
            else
                store_streaming(y, line);
        }
    }

    int group_, thread_;
    uint32_t to_, from_;       // in the first buffer
    int token_ = 0, row_ = 0;  // of the thread's first 16 bytes
    bool holds_ = false;       // the last rounds
    uint32_t held_words_[kHeld][8] = {};
};

}  // namespace
}  // namespace lowbit::cuda
