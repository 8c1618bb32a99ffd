// The forward and the backward product of an adapted layer as C functions: what the operators of
// registration_lora.cpp and registration_backward.cpp run, without an operator around it. Boxing
// some twenty arguments and checking them costs the host more than a launch does.
//
// The caller (lowbit/backends/cuda_direct.py) holds the tensors, has allocated the results, and
// answers for shapes, dtypes and contiguity; an operator has accepted the weight before. All
// pointers are device pointers, read and written on the device's current stream. What is not served
// here, and every error before the first launch, comes back as 1 with nothing said: the caller then
// takes the operator, whose checks find the reason. A backward pass that fails later comes back as
// 2: it may have added to dx already.

#include <optional>

#include "lora_calls.h"

#define LOWBIT_C_API extern "C" __attribute__((visibility("default")))

namespace lowbit::cuda {
namespace {

// Every field takes 8 bytes; cuda_direct.py packs them in this order, as it does WeightArguments.

// What is the same in every call of a kernel for the same sizes.
struct DirectSizes {
    int64_t M, r, dtype, lora_A_dtype, lora_B_dtype, device, kernel;
};

struct DirectProduct {
    const void *x, *lora_A, *lora_B;
    const float* lora_scaling;
    const void *bias, *z_in;
    void *z_out, *y;
    double scaling;
};

struct DirectBackward {
    const void *dy, *x, *z, *lora_A, *lora_B;
    const float* lora_scaling;
    void *dx, *d_lora_A, *d_lora_B, *d_bias;
    float* d_lora_scaling;
    int64_t adds;  // to what is in dx
    double scaling;
};

constexpr const ProductKernel* kKernels[] = {&kGemv, &kSmall, &kMid, &kLarge, &kPortable};
constexpr const DxKernel* kDxKernels[] = {&kDxInLoop, &kDxLarge};

// The current stream of a device, which is the thread's current one as long as this lives.
class OnDevice {
public:
    explicit OnDevice(int64_t device) {
        // torch's current device, which its allocator goes by, need not be the runtime's: going
        // back to a device that is not in use yet, torch only remembers it.
        int current = 0;
        check_launch(cudaGetDevice(&current), "direct call");
        const int32_t torch_current = torch::stable::accelerator::getCurrentDeviceIndex();
        // A guard that changes nothing costs the host as much.
        if (current != device || torch_current != device)
            guard_.emplace(static_cast<int32_t>(device));
        void* stream = nullptr;
        TORCH_ERROR_CODE_CHECK(
            aoti_torch_get_current_cuda_stream(static_cast<int32_t>(device), &stream));
        stream_ = static_cast<cudaStream_t>(stream);
    }

    cudaStream_t stream() const {
        return stream_;
    }

private:
    std::optional<torch::stable::accelerator::DeviceGuard> guard_;
    cudaStream_t stream_;
};

void check_alignment(std::initializer_list<const void*> pointers) {
    for (const void* p : pointers)
        STD_TORCH_CHECK(is_aligned(p), "an argument is not 16-byte aligned");
}

void product(
    const WeightArguments& weight, const DirectSizes& sizes, const DirectProduct& p, bool&) {
    const OnDevice on(sizes.device);
    check_alignment(
        {weight.qweight, weight.absmax, p.x, p.lora_A, p.lora_B, p.bias, p.z_in, p.z_out});
    LoraMatmulArgs a{};
    a.w = weight.view();
    a.dtype = static_cast<Dtype>(sizes.dtype);
    a.x = p.x, a.lora_A = p.lora_A, a.lora_B = p.lora_B;
    a.lora_scaling = p.lora_scaling, a.scaling = static_cast<float>(p.scaling);
    a.bias = p.bias, a.z_in = p.z_in, a.z_out = p.z_out, a.y = p.y;
    a.M = sizes.M, a.r = static_cast<int>(sizes.r);
    // A tensor whose storage was freed has a shape, but no memory.
    const bool adapter = p.lora_B != nullptr && (p.lora_A != nullptr) != (p.z_in != nullptr);
    STD_TORCH_CHECK(p.x != nullptr && (a.r == 0 || adapter), "an argument has no memory");
    run_product(*kKernels[sizes.kernel], a, on.stream());
}

void backward(
    const WeightArguments& weight,
    const DirectSizes& sizes,
    const DirectBackward& p,
    bool& launched) {
    const OnDevice on(sizes.device);
    check_alignment({weight.qweight, p.dy, p.x, p.z, p.lora_A, p.lora_B, p.dx, p.d_lora_A});
    STD_TORCH_CHECK(p.dy && p.lora_A && p.lora_B, "an argument has no memory");
    STD_TORCH_CHECK(p.d_lora_A == nullptr || p.x != nullptr, "the gradient of lora_A needs x");
    STD_TORCH_CHECK(
        (p.d_lora_B == nullptr && p.d_lora_scaling == nullptr) || p.z != nullptr,
        "the gradients of lora_B and lora_scaling need z");
    LoraGradsArgs a{};
    a.dtype = static_cast<Dtype>(sizes.dtype);
    a.lora_A_dtype = static_cast<Dtype>(sizes.lora_A_dtype);
    a.lora_B_dtype = static_cast<Dtype>(sizes.lora_B_dtype);
    a.dy = p.dy, a.x = p.x, a.z = p.z, a.lora_B = p.lora_B;
    a.lora_scaling = p.lora_scaling, a.scaling = static_cast<float>(p.scaling);
    a.M = sizes.M, a.N = weight.N, a.K = weight.K, a.r = static_cast<int>(sizes.r);
    a.d_lora_A = p.d_lora_A, a.d_lora_B = p.d_lora_B;
    a.d_bias = p.d_bias, a.d_lora_scaling = p.d_lora_scaling;
    LoraDxArgs b{};
    const DxKernel& kernel = *kDxKernels[sizes.kernel];
    if (p.dx != nullptr) {
        b.w = weight.view();
        b.dtype = a.dtype, b.lora_A_dtype = a.lora_A_dtype;
        b.dy = p.dy, b.lora_A = p.lora_A, b.dx = p.dx;
        b.adds = p.adds != 0;
        b.M = a.M, b.r = a.r;
        STD_TORCH_CHECK(kernel.serves(b), "dx is not served");
    }
    run_backward(kernel, a, b, on.stream(), &launched);
}

// 0 if it ran, 1 if nothing was launched, 2 if it failed later.
template <class Arguments>
int attempt(
    void (*run)(const WeightArguments&, const DirectSizes&, const Arguments&, bool&),
    const void* weight,
    const void* sizes,
    const void* arguments) {
    bool launched = false;
    try {
        run(*static_cast<const WeightArguments*>(weight), *static_cast<const DirectSizes*>(sizes),
            *static_cast<const Arguments*>(arguments), launched);
        return 0;
    } catch (...) {
        return launched ? 2 : 1;
    }
}

}  // namespace
}  // namespace lowbit::cuda

LOWBIT_C_API int lowbit_product(const void* weight, const void* sizes, const void* arguments) {
    return lowbit::cuda::attempt(lowbit::cuda::product, weight, sizes, arguments);
}

LOWBIT_C_API int lowbit_backward(const void* weight, const void* sizes, const void* arguments) {
    return lowbit::cuda::attempt(lowbit::cuda::backward, weight, sizes, arguments);
}
