// What launchers ask of the current device and of pointers. Host code.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lowbit::cuda {

// 0 if it cannot be had.
inline int device_attribute(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess)
        return 0;
    return value;
}

inline int sm_count() {
    return device_attribute(cudaDevAttrMultiProcessorCount);
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
