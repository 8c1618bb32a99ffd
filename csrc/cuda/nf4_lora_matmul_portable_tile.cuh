// How nf4_lora_matmul_portable_sm80.cu cuts the product, what its kernel is told, and how codes and
// tokens come to a warp.
#pragma once

#include "common.cuh"
#include "nf4_lora_matmul_shares.cuh"
#include "nf4_lora_matmul_tables.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kRowTiles = 2;  // of 16 rows, of a warp: they share what it reads of x
constexpr int kWarpRows = 16 * kRowTiles;
constexpr int kStepBlocks = 2;  // of K, that a warp multiplies at a time: 64 bytes of each row
constexpr int kMaxRank = 64;
constexpr int kTokenLine = kBlock * 2;  // bytes of a token in a block

// kGroups groups of warps share the columns of a tile, and the warps of a group its rows.
template <int kTokens_, int kGroups_>
struct Tile {
    static constexpr int kTokens = kTokens_;
    static constexpr int kGroups = kGroups_;
    static constexpr int kRowGroups = kWarps / kGroups;
    static constexpr int kRows = kWarpRows * kRowGroups;
    static constexpr int kFinishers = kRowGroups * kWarpSize;  // threads of K group 0
    static constexpr int kColumns = kTokens / 8;               // of tiles of a product
    static constexpr int kTileSums = kColumns * 4;             // per thread
    static constexpr int kSums = kRowTiles * kTileSums;
    static constexpr int kUnit = kStepBlocks * kGroups;  // blocks along K
    static constexpr int kLines = kUnit * kTokens;       // of x, per unit
    // absmax is applied to the sums over a block or, where these are more than its codes, to the
    // values.
    static constexpr bool kScaleWeight = kTokens > 16;
    // The plan takes the smallest tile that holds all tokens, so that of them only the largest
    // comes more than once.
    static constexpr bool kOneTokenTile = kTokens <= 16;

    // The second halves of the pair table's entries hold x, twice.
    static constexpr int kScales = kTableBytes;
    static constexpr int kWarpScales = kRowTiles * kScaleBytes;
    static constexpr int kNestedCodebook = kScales + kWarps * kWarpScales;
    static constexpr int kZ = kNestedCodebook + 256 * 4;
    static constexpr int kBytes = kZ + kTokens * kMaxRank * 2;

    static_assert(kFinishBarrier + kRowGroups < 16, "one barrier each");
    static_assert(2 * kLines <= 256, "x fits beside the table");
    static_assert(kTableStride == 2 * kTokenLine);
    static_assert(kLines % (kThreads / 8) == 0, "each thread copies as much");
};

struct Problem {
    WeightView w;
    const void* x;           // [M, K]
    const void* lora_B;      // [N, r]
    const void* bias;        // [N] or null
    const float* partial_z;  // [z_slices][padded M][padded rank], null: z_in
    const void* z_in;        // [M, r]
    void* z_out;             // [M, r] or null
    const float* lora_scaling;
    float scaling;
    int z_slices;
    float* partials;  // [CTAs][kRows kTokens]
    uint32_t* flags;  // [CTAs], zeroed by the launch in front
    uint32_t mark;    // 1
    void* y;
    int M;
    int r;
    Divisor by_rank;  // padded to a multiple of 16; if r > 0
    int blocks;       // of a row
    int row_bytes;    // of codes
    int token_tiles;  // neighbours among the tiles: the same rows
    Divisor by_token_tiles;
    Shares shares;
};

template <typename Tile>
__device__ __forceinline__ int token_tiles(const Problem& p) {
    return Tile::kOneTokenTile ? 1 : p.token_tiles;
}

// A segment as a warp sees it.
struct Run {
    int row0;    // of the warp
    int token0;  // of the tile
    int block0;  // of K, of the first group
    int count;   // units; group g has those after g count
};

// ---- codes --------------------------------------------------------------------------------------

// Lane t of quad g reads 16 bytes, half a block, of rows row_of(g) and row_of(g) + 2 of each row
// tile: block t % 2, half t / 2.
struct Codes {
    uint4 rows[kRowTiles][2];

    __device__ __forceinline__ void load(const Problem& p, int row0, int block) {
        const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
        const int last = static_cast<int>(p.w.N) - 16;
        const int own = block + t % 2;  // past the end of a row, where x is zero, any will do
        const int offset = (own < p.blocks ? own : 0) * (kBlock / 2) + t / 2 * 16;
#pragma unroll
        for (int j = 0; j < kRowTiles; j++) {
            const int64_t row = min(row0 + 16 * j, last) + row_of(g);
            const uint8_t* codes = p.w.qweight + row * p.row_bytes + offset;
            rows[j][0] = load_streaming(reinterpret_cast<const uint4*>(codes));
            rows[j][1] = load_streaming(reinterpret_cast<const uint4*>(codes + 2 * p.row_bytes));
        }
    }
};

// What a lane of a quad has of two blocks: bytes 8 t on of each.
struct Blocks {
    uint2 of[kStepBlocks];
};

// By halves between neighbours, so that a product is about one block only.
__device__ __forceinline__ Blocks exchange_halves(const uint4& v) {
    const bool odd = threadIdx.x % 2;
    const uint32_t x = __shfl_xor_sync(kFullWarp, odd ? v.x : v.z, 1);
    const uint32_t y = __shfl_xor_sync(kFullWarp, odd ? v.y : v.w, 1);
    return odd ? Blocks{{{x, y}, {v.z, v.w}}} : Blocks{{{v.x, v.y}, {x, y}}};
}

// Four bytes each of two rows to the operands of two products.
__device__ __forceinline__ void
look_up(uint32_t (&a)[2][4], const uint8_t* table, uint32_t low, uint32_t high) {
    const uint32_t lane_offset = threadIdx.x % kWarpSize * 4;
#pragma unroll
    for (int byte = 0; byte < 4; byte++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            // Byte 1 of the address is the code pair, byte 0 the lane.
            const uint32_t at = prmt(i == 0 ? low : high, lane_offset, 0x7604u | byte << 4);
            a[byte / 2][byte % 2 * 2 + i] = *reinterpret_cast<const uint32_t*>(table + at);
        }
    }
}

// ---- x ------------------------------------------------------------------------------------------

// Line i of a buffer: token i % kTokens in block i / kTokens of the unit. 16-byte chunk c lies at c
// ^ (token % 2): eight lanes read four chunks, every second one, of two tokens.
template <typename Tile>
__device__ __forceinline__ uint32_t token_line(int buffer, int line) {
    return kTokenLine + (buffer * Tile::kLines + line) * kTableStride;
}

template <typename T, typename Tile>
__device__ __forceinline__ void
copy_tokens(const Problem& p, const Run& run, int unit, uint32_t smem, int buffer) {
    const int chunk = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < Tile::kLines; i += kThreads / 8) {
        const int line = i + threadIdx.x / 8;
        const int token = line % Tile::kTokens, place = line / Tile::kTokens;
        const int block = run.block0 + place % kStepBlocks +
                          (place / kStepBlocks * run.count + unit) * kStepBlocks;
        const bool inside = block < p.blocks;
        if (run.token0 + token < p.M)
            copy_async_16_or_zeros(
                smem + token_line<Tile>(buffer, line) + (chunk ^ (token & 1)) * 16,
                static_cast<const T*>(p.x) + (run.token0 + token) * p.w.K +
                    (inside ? block : 0) * kBlock + chunk * 8,
                inside);
    }
}

__device__ __forceinline__ uint32_t scale_pair(uint32_t pair, float scale, __nv_bfloat16) {
    const __nv_bfloat162 s = __float2bfloat162_rn(scale);
    const __nv_bfloat162 v = __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&pair), s);
    return *reinterpret_cast<const uint32_t*>(&v);
}

__device__ __forceinline__ uint32_t scale_pair(uint32_t pair, float scale, __half) {
    const __half2 v = __hmul2(*reinterpret_cast<const __half2*>(&pair), __float2half2_rn(scale));
    return *reinterpret_cast<const uint32_t*>(&v);
}

}  // namespace
}  // namespace lowbit::cuda
