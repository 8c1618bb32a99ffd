// The 4-bit linear layer with a low-rank branch.
//
//     forward    z = dropped(x) lora_A^T          y = x W^T + (z * scale) lora_B^T + bias
//     backward   u = dy lora_B                    dx = dy W + dropped((u * scale) lora_A)
//                d_lora_A = (u * scale)^T dropped(x)     d_lora_B = scale * dy^T z     d_bias = sum_m dy
//
// y with z, and dx with u, are fused products (linear.cpp). The two adapter gradients reduce over M and read x or dy once, in fp32
// for every input type: A is the transpose of a thin [M, r] matrix, B the activation as it lies in memory. They are bound by
// reading the activation. The bias gradient is one more row of A, of ones.

#include "lora_linear.h"

namespace lowbit::cpu {
namespace {

int64_t min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

int64_t element_size(Dtype type) {
    return type == Dtype::kFloat32 ? 4 : 2;
}

float element(const void* data, Dtype type, int64_t i) {
    switch (type) {
        case Dtype::kFloat32:
            return static_cast<const float*>(data)[i];
        case Dtype::kBFloat16:
            return to_float(static_cast<const bf16_t*>(data)[i]);
        default:
            return to_float(static_cast<const fp16_t*>(data)[i]);
    }
}

void set_element(void* data, Dtype type, int64_t i, float value) {
    switch (type) {
        case Dtype::kFloat32:
            return store_float(static_cast<float*>(data) + i, value);
        case Dtype::kBFloat16:
            return store_float(static_cast<bf16_t*>(data) + i, value);
        case Dtype::kFloat16:
            return store_float(static_cast<fp16_t*>(data) + i, value);
    }
}

// C [rows, columns] = thin^T activation, rows = r thin columns and, on request, one of ones: the sum over m.
struct RowReduction {
    const GemmKernels& kernels;
    int64_t M, rows;
    Chunks chunks;
    Buffer<uint32_t> packed;

    RowReduction(const GemmKernels& kernels, int64_t M, int64_t rows)
        : kernels(kernels),
          M(M),
          rows(rows),
          chunks(M, kernels),
          packed(chunks.count * rows * kChunk) {}

    // thin(m, j) gives element j of row m.
    template <typename Thin>
    void pack(const Thin& thin) {
        parallel_for(0, chunks.count, 1, [&](int64_t first, int64_t last) {
            for (int64_t chunk = first; chunk < last; ++chunk) {
                float* const out = reinterpret_cast<float*>(packed.get()) + chunk * rows * kChunk;
                for (int64_t m = chunks.begin(chunk); m < chunks.end(chunk); ++m) {
                    for (int64_t j = 0; j < rows; ++j) {
                        out[j * kChunk + m - chunks.begin(chunk)] = thin(m, j);
                    }
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
    int64_t r, columns;
    const float* scale;
    void* d_lora_A;  // [r, columns]
    void* d_lora_B;  // [columns, r]
    void* d_bias;    // [columns]
    Dtype adapter_type, bias_type;
};

void store_d_lora_A(const void* context, float* c, int64_t ldc, int64_t row, int64_t rows,
                    int64_t column, int64_t columns) {
    const auto& s = *static_cast<const GradientStore*>(context);
    for (int64_t j = 0; j < rows; ++j) {
        for (int64_t k = 0; k < columns; ++k) {
            set_element(s.d_lora_A, s.adapter_type, (row + j) * s.columns + column + k,
                        c[j * ldc + k]);
        }
    }
}

// Tile row r, if there is one, is the sum over m.
void store_d_lora_B(const void* context, float* c, int64_t ldc, int64_t row, int64_t rows,
                    int64_t column, int64_t columns) {
    const auto& s = *static_cast<const GradientStore*>(context);
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t j = row + i;
        for (int64_t n = 0; n < columns; ++n) {
            const float value = c[i * ldc + n];
            if (j == s.r) {
                set_element(s.d_bias, s.bias_type, column + n, value);
            } else if (s.d_lora_B != nullptr) {
                set_element(s.d_lora_B, s.adapter_type, (column + n) * s.r + j, value * s.scale[j]);
            }
        }
    }
}

}  // namespace

void lora_linear(const void* x, Dtype type, int64_t M, const LoraArgs& lora, const void* bias,
                 Dtype bias_type, void* y, void* z) {
    const int64_t N = lora.weight.N, K = lora.weight.K;
    LowRank low{};
    low.thin = dense_operand(lora.lora_A, lora.lora_A_type, type, lora.r, K, true);
    low.low = dense_operand(lora.lora_B, lora.lora_B_type, type, N, lora.r, true);
    low.r = lora.r;
    low.scale = lora.scale;
    low.dropout = lora.dropout;
    low.dropout_on_input = true;
    low.rounded = z;
    FusedProduct args{};
    args.a = x;
    args.type = type;
    args.M = M;
    args.main = {row_aligned(lora.weight), true, type};
    args.low_rank = &low;
    args.bias = bias;
    args.bias_type = bias_type;
    args.out = y;
    run_fused_product(args);
}

namespace {

// u [M, r] = dy lora_B in fp32, and dx when its pointer is given.
void input_gradient(const void* dy, Dtype type, int64_t M, const LoraArgs& lora, float* u,
                    void* dx) {
    const int64_t N = lora.weight.N, K = lora.weight.K;
    LowRank low{};
    low.thin = dense_operand(lora.lora_B, lora.lora_B_type, type, N, lora.r, false);
    low.low = dense_operand(lora.lora_A, lora.lora_A_type, type, lora.r, K, false);
    low.r = lora.r;
    low.scale = lora.scale;
    low.dropout = lora.dropout;
    low.dropout_on_input = false;
    low.exact = u;
    FusedProduct args{};
    args.a = dy;
    args.type = type;
    args.M = M;
    args.main = {row_aligned(lora.weight), false, type};
    args.low_rank = &low;
    args.out = dx;
    run_fused_product(args);
}

void scaling_gradient(const float* u, const void* z, Dtype type, int64_t M, int64_t r,
                      float scaling, float* out) {
    for (int64_t j = 0; j < r; ++j) {
        double sum = 0.0;
        for (int64_t m = 0; m < M; ++m) sum += double{u[m * r + j]} * element(z, type, m * r + j);
        out[j] = static_cast<float>(sum * scaling);
    }
}

}  // namespace

void lora_linear_backward(const void* dy, const void* x, const void* z, Dtype type, int64_t M,
                          const LoraArgs& lora, float scaling, const LoraGradients& gradients) {
    const int64_t N = lora.weight.N, K = lora.weight.K, r = lora.r;
    const GemmKernels& exact = gemm_kernels(type, true);
    Buffer<float> u(M * r);
    if (gradients.dx != nullptr || gradients.d_lora_A != nullptr ||
        gradients.d_lora_scaling != nullptr) {
        input_gradient(dy, type, M, lora, u.get(), gradients.dx);
    }
    if (gradients.d_lora_scaling != nullptr) {
        scaling_gradient(u.get(), z, type, M, r, scaling, gradients.d_lora_scaling);
    }
    if (gradients.d_lora_A != nullptr) {
        RowReduction reduction(exact, M, r);
        reduction.pack([&](int64_t m, int64_t j) { return u.get()[m * r + j] * lora.scale[j]; });
        GradientStore store{};
        store.columns = K;
        store.d_lora_A = gradients.d_lora_A;
        store.adapter_type = lora.lora_A_type;
        Operand dropped_x = dense_operand(x, type, type, M, K, false);
        dropped_x.dropout = lora.dropout;
        reduction.run(dropped_x, K, {store_d_lora_A, &store});
    }
    if (gradients.d_lora_B != nullptr || gradients.d_bias != nullptr) {
        RowReduction reduction(exact, M, r + (gradients.d_bias != nullptr ? 1 : 0));
        reduction.pack(
            [&](int64_t m, int64_t j) { return j == r ? 1.0f : element(z, type, m * r + j); });
        GradientStore store{};
        store.r = r;
        store.columns = N;
        store.scale = lora.scale;
        store.d_lora_B = gradients.d_lora_B;
        store.d_bias = gradients.d_bias;
        store.adapter_type = lora.lora_B_type;
        store.bias_type = type;
        reduction.run(dense_operand(dy, type, type, M, N, false), N, {store_d_lora_B, &store});
    }
}

}  // namespace lowbit::cpu
