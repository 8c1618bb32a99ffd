// The product of gemm.h for bf16 activations with AMX tiles.
//
// A tile multiplies 16 rows x 32 steps of A with 32 steps x 16 columns of B. Rows of packed A are
// rows of the tile; a panel of bf16 pairs already is the layout the instruction wants of B: [pair
// of steps][column][2]. Four tiles of C (32 x 32) make one tile load per multiplication. Sums
// continue in the tiles from chunk to chunk. Rows are padded with zeros to 16, chunks to 32 steps.

#include "gemm_avx512.h"

namespace lowbit::cpu {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileWords = 16;  // 64 bytes

// Tile registers 0 to 3: C; 4, 5: A; 6, 7: B. All have the full shape.
struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "the instruction reads 64 bytes");
// A constant in memory: GCC's intrinsic tells the compiler of 8 bytes only, so that it may drop the
// stores that fill the rest of a local object (GCC 12).
constexpr TileConfig kTileConfig;

// R tiles of 16 rows x P panels. The intrinsics want literal register numbers.
template <int R, int P>
void run_tiles(const uint32_t* a, const uint32_t* b, int words, float* c, int64_t ldc, bool first) {
    const uint32_t* const a_1 = a + kTileRows * kChunk;
    const uint32_t* const b_1 = b + kPanelStride;
    float* const c_1 = c + kTileRows * ldc;
    constexpr int kAStride = kChunk * sizeof(uint32_t), kBStride = kPanel * sizeof(uint32_t);
    const int64_t c_stride = ldc * static_cast<int64_t>(sizeof(float));
    if (first) {
        _tile_zero(0);
        if constexpr (P > 1)
            _tile_zero(1);
        if constexpr (R > 1)
            _tile_zero(2);
        if constexpr (R > 1 && P > 1)
            _tile_zero(3);
    } else {
        _tile_loadd(0, c, c_stride);
        if constexpr (P > 1)
            _tile_loadd(1, c + kPanel, c_stride);
        if constexpr (R > 1)
            _tile_loadd(2, c_1, c_stride);
        if constexpr (R > 1 && P > 1)
            _tile_loadd(3, c_1 + kPanel, c_stride);
    }
    for (int k = 0; k < words; k += kTileWords) {
        _tile_loadd(4, a + k, kAStride);
        _tile_loadd(6, b + k * kPanel, kBStride);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (P > 1) {
            _tile_loadd(7, b_1 + k * kPanel, kBStride);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (R > 1) {
            _tile_loadd(5, a_1 + k, kAStride);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (R > 1 && P > 1)
            _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_stride);
    if constexpr (P > 1)
        _tile_stored(1, c + kPanel, c_stride);
    if constexpr (R > 1)
        _tile_stored(2, c_1, c_stride);
    if constexpr (R > 1 && P > 1)
        _tile_stored(3, c_1 + kPanel, c_stride);
}

template <int P>
LOWBIT_INLINE void run_tile_rows(ChunkProduct x) {
    for (; x.rows > kTileRows; x.rows -= 2 * kTileRows) {
        run_tiles<2, P>(x.a, x.b, x.words, x.c, x.ldc, x.first);
        x.a += 2 * kTileRows * kChunk;
        x.c += 2 * kTileRows * x.ldc;
    }
    if (x.rows > 0)
        run_tiles<1, P>(x.a, x.b, x.words, x.c, x.ldc, x.first);
}

struct Amx : Decoders<Bf16Words> {
    static constexpr int kWordMultiple = kTileWords, kRowMultiple = kTileRows, kDirectRows = 0;
    static constexpr int64_t kBlockRows = 512;  // 512 KiB of A in a 2 MiB L2 cache

    static void multiply_block(ChunkProduct x) {
        _tile_loadconfig(&kTileConfig);
        for (; x.panels >= 2; x.panels -= 2, x.b += 2 * kPanelStride, x.c += 2 * kPanel)
            run_tile_rows<2>(x);
        if (x.panels > 0)
            run_tile_rows<1>(x);
        _tile_release();
    }
};

}  // namespace

constexpr GemmKernels kGemmAmx = kernel_set<Amx>();

}  // namespace lowbit::cpu
