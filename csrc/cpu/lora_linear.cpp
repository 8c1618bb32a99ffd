// The 4-bit linear layer with a low-rank branch.
//
//     forward    z = dropped(x) lora_A^T          y = x W^T + (z * scale) lora_B^T + bias
//     backward   u = dy lora_B                    dx = dy W + dropped((u * scale) lora_A)
//                d_lora_A = (u * scale)^T dropped(x)     d_lora_B = scale * dy^T z
//                d_bias = sum_m dy
//
// y with z, and dx with u, are fused products (linear.cpp). The two adapter gradients reduce over M
// and read x or dy once, in fp32 for every input type: A is the transpose of a thin [M, r] matrix,
// B the activation as it lies in memory. They are bound by reading the activation. The bias
// gradient is one more row of A, of ones.

#include "lora_linear.h"

namespace lowbit::cpu {
namespace {

// C [rows, columns] = thin^T activation, rows = r thin columns and, on request, one of ones: the
// sum over m.
struct RowReduction {
    const GemmKernels& kernels;
    int64_t M, rows;
    Chunks chunks;
    Buffer<uint32_t> packed;

    RowReduction(const GemmKernels& kernels, int64_t M, int64_t rows)
        : kernels(kernels), M(M), rows(rows), chunks(M, kernels),
          packed(chunks.count * rows * kChunk) {}

    // Row j of A = column j of thin [M, r], times scale[j] where there is a scale. Rows from r on
    // are ones.
    void pack(const float* thin, int64_t r, const float* scale) {
        parallel_for(0, chunks.count, 1, [&](int64_t first, int64_t last) {
            for (int64_t chunk = first; chunk < last; ++chunk) {
                float* const out = reinterpret_cast<float*>(packed.get()) + chunk * rows * kChunk;
                const int64_t begin = chunks.begin(chunk), n = chunks.end(chunk) - begin;
                const int64_t padding = chunks.words(chunk) - n;
                for (int64_t j = 0; j < rows; ++j) {
                    const float* const column = thin + begin * r + j;
                    for (int64_t i = 0; i < n; ++i) {
                        const float value = j < r ? column[i * r] : 1.0f;
                        out[j * kChunk + i] = scale != nullptr ? value * scale[j] : value;
                    }
                    // What the zeros of B meet must not be a NaN that an earlier product left.
                    std::memset(out + j * kChunk + n, 0, padding * sizeof(float));
                }
            }
        });
    }

    void run(const Operand& activation, int64_t columns, const TileFunction& store) const {
        const Part part{&activation, chunks, {packed.get(), rows, rows}};
        Product product{};
        product.kernels = &kernels;
        product.parts = &part;
        product.part_count = 1;
        product.rows = rows;
        product.columns = columns;
        product.store = store;
        run_product(product);
    }
};

struct GradientStore {
    const GemmKernels& kernels;
    int64_t r, columns;
    const float* scale;
    void* d_lora_A;  // [r, columns]
    void* d_lora_B;  // [columns, r]
    void* d_bias;    // [columns]
    Dtype adapter_type, bias_type;
};

char* at(void* data, Dtype type, int64_t i) {
    return static_cast<char*>(data) + i * element_size(type);
}

void store_d_lora_A(const void* context, const ResultTile& tile) {
    const auto& s = *static_cast<const GradientStore*>(context);
    for (int64_t j = 0; j < tile.rows; ++j) {
        s.kernels.store_row(
            tile.c + j * tile.ldc, nullptr, tile.columns, s.adapter_type,
            at(s.d_lora_A, s.adapter_type, (tile.row + j) * s.columns + tile.column));
    }
}

// Row r of the sum, if there is one, is the sum over m.
void store_d_lora_B(const void* context, const ResultTile& tile) {
    const auto& s = *static_cast<const GradientStore*>(context);
    auto [c, ldc, row, rows, column, columns] = tile;
    if (s.d_bias != nullptr && row + rows > s.r) {
        s.kernels.store_row(
            c + (s.r - row) * ldc, nullptr, columns, s.bias_type,
            at(s.d_bias, s.bias_type, column));
        --rows;
    }
    if (s.d_lora_B == nullptr)
        return;
    constexpr int64_t kPiece = 64;
    float values[kPiece];
    for (int64_t n = 0; n < columns; ++n) {
        for (int64_t j = 0; j < rows; j += kPiece) {
            const int64_t count = min64(kPiece, rows - j);
            for (int64_t i = 0; i < count; ++i) {
                values[i] = c[(j + i) * ldc + n] * s.scale[row + j + i];
            }
            s.kernels.store_row(
                values, nullptr, count, s.adapter_type,
                at(s.d_lora_B, s.adapter_type, (column + n) * s.r + row + j));
        }
    }
}

// The branch of one direction, without the place for its factor t.
LowRank low_rank(const LoraArgs& lora, Dtype type, bool forward) {
    const int64_t N = lora.weight.N, K = lora.weight.K, r = lora.r;
    const Operand A = dense_operand(lora.lora_A, lora.lora_A_type, type, r, K, forward);
    const Operand B = dense_operand(lora.lora_B, lora.lora_B_type, type, N, r, forward);
    LowRank low{};
    low.thin = forward ? A : B;
    low.low = forward ? B : A;
    low.r = r;
    low.scale = lora.scale;
    low.dropout = lora.dropout;
    low.dropout_on_input = forward;
    return low;
}

// u [M, r] = dy lora_B in fp32, and dx when its pointer is given.
void input_gradient(
    const void* dy, Dtype type, int64_t M, const LoraArgs& lora, float* u, void* dx) {
    LowRank low = low_rank(lora, type, false);
    low.exact = u;
    FusedProduct product = weight_product(dy, type, M, lora.weight, false, dx);
    product.low_rank = &low;
    run_fused_product(product);
}

void scaling_gradient(
    const float* u, const float* z, int64_t M, int64_t r, float scaling, float* out) {
    for (int64_t j = 0; j < r; ++j) {
        double sum = 0.0;
        for (int64_t m = 0; m < M; ++m)
            sum += double{u[m * r + j]} * z[m * r + j];
        out[j] = static_cast<float>(sum * scaling);
    }
}

// d_lora_A = (u * scale)^T dropped(x)
void gradient_A(
    const GemmKernels& kernels,
    const void* x,
    Dtype type,
    int64_t M,
    const LoraArgs& lora,
    const float* u,
    void* d_lora_A) {
    const int64_t K = lora.weight.K;
    RowReduction reduction(kernels, M, lora.r);
    reduction.pack(u, lora.r, lora.scale);
    Operand dropped_x = dense_operand(x, type, type, M, K, false);
    dropped_x.dropout = lora.dropout;
    const GradientStore store{kernels, lora.r,           K,   lora.scale, d_lora_A, nullptr,
                              nullptr, lora.lora_A_type, type};
    reduction.run(dropped_x, K, {store_d_lora_A, &store});
}

// d_lora_B = scale * dy^T z and d_bias = sum_m dy; one of the two may be null.
void gradient_B(
    const GemmKernels& kernels,
    const void* dy,
    Dtype type,
    int64_t M,
    const LoraArgs& lora,
    const float* z,
    void* d_lora_B,
    void* d_bias) {
    const int64_t N = lora.weight.N;
    RowReduction reduction(kernels, M, lora.r + (d_bias != nullptr ? 1 : 0));
    reduction.pack(z, lora.r, nullptr);
    const GradientStore store{kernels, lora.r,           N,   lora.scale, nullptr, d_lora_B,
                              d_bias,  lora.lora_B_type, type};
    reduction.run(dense_operand(dy, type, type, M, N, false), N, {store_d_lora_B, &store});
}

}  // namespace

void lora_linear(
    const void* x,
    Dtype type,
    int64_t M,
    const LoraArgs& lora,
    const void* bias,
    Dtype bias_type,
    void* y,
    void* z) {
    LowRank low = low_rank(lora, type, true);
    low.rounded = z;
    FusedProduct product = weight_product(x, type, M, lora.weight, true, y);
    product.low_rank = &low;
    product.bias = bias;
    product.bias_type = bias_type;
    run_fused_product(product);
}

void lora_linear_backward(
    const void* dy,
    const void* x,
    const void* z,
    Dtype type,
    int64_t M,
    const LoraArgs& lora,
    float scaling,
    const LoraGradients& gradients) {
    const GemmKernels& exact = gemm_kernels(type, true);
    Buffer<float> u(M * lora.r), z_fp32(M * lora.r);
    exact.load_row(z, type, M * lora.r, z_fp32.get());
    if (gradients.dx != nullptr || gradients.d_lora_A != nullptr ||
        gradients.d_lora_scaling != nullptr) {
        input_gradient(dy, type, M, lora, u.get(), gradients.dx);
    }
    if (gradients.d_lora_scaling != nullptr) {
        scaling_gradient(u.get(), z_fp32.get(), M, lora.r, scaling, gradients.d_lora_scaling);
    }
    if (gradients.d_lora_A != nullptr) {
        gradient_A(exact, x, type, M, lora, u.get(), gradients.d_lora_A);
    }
    if (gradients.d_lora_B != nullptr || gradients.d_bias != nullptr) {
        gradient_B(exact, dy, type, M, lora, z_fp32.get(), gradients.d_lora_B, gradients.d_bias);
    }
}

}  // namespace lowbit::cpu
