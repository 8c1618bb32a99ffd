// The product of gemm.h in fp32 with AVX-512; 16-bit activations are converted while A is packed.

#include "gemm_avx512.h"

namespace lowbit::cpu {

constexpr GemmKernels kGemmAvx512 = kernel_set<VectorIsa<Fp32Words>>();

}  // namespace lowbit::cpu
