// What launchers ask of the driver, of the current device and of pointers. Host code.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace lowbit::cuda {

// From the driver that is loaded, so that nothing links against it; null if it has none of this
// name that goes back to CUDA `since` (12050 for 12.5).
template <typename Function>
Function driver_function(const char* name, unsigned since) {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion(name, &entry, since, cudaEnableDefault, &result);
    if (error != cudaSuccess)
        cudaGetLastError();  // the answer is null; left in place it would be taken for another's
    const bool found = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return found ? reinterpret_cast<Function>(entry) : nullptr;
}

// 0 if it cannot be had.
inline int device_attribute(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess)
        return 0;
    return value;
}

// Of the device. By NVIDIA's documentation an MPS client with a percentage sees those that it may
// use; that is untried.
inline int sm_count() {
    return device_attribute(cudaDevAttrMultiProcessorCount);
}

// Whether kernels in a stream run in a green context, on fewer SMs than sm_count. That is decided
// by the context that the stream was created in, for the default stream by the thread's current
// one.
inline bool in_green_context(cudaStream_t stream) {
    static const auto contexts_of =
        driver_function<decltype(&cuStreamGetCtx_v2)>("cuStreamGetCtx", 12050);
    CUcontext context = nullptr;
    CUgreenCtx green = nullptr;
    return contexts_of != nullptr && contexts_of(stream, &context, &green) == CUDA_SUCCESS &&
           green != nullptr;
}

// Whether the current device runs the *_sm90.cu kernels: compute capability 9.0, not later ones.
inline bool device_is_sm90() {
    return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
           device_attribute(cudaDevAttrComputeCapabilityMinor) == 0;
}

inline bool is_aligned(const void* p, uintptr_t bytes = 16) {
    return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

}  // namespace lowbit::cuda
