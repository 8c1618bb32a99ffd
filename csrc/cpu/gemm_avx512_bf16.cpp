// The product of gemm.h for bf16 activations with the AVX-512 bf16 dot product (two steps of the
// reduction per lane). The instruction adds to an fp32 sum and flushes subnormals; a weight is
// rounded to bf16 once, as dequantize does.

#include "gemm_avx512.h"

namespace lowbit::cpu {

constexpr GemmKernels kGemmAvx512Bf16 = kernel_set<VectorIsa<Bf16Words>>();

}  // namespace lowbit::cpu
