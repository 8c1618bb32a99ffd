// What launchers tell the driver: how much shared memory a kernel may take, and that a launch may
// start before the kernels in front of it in the stream have ended (programmatic dependent launch);
// the kernel waits for them itself. A launch returns its own error: cudaGetLastError may give one
// that somebody left unread long before.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace lowbit::cuda {

// Lets a kernel take `bytes` of dynamic shared memory, always the same number. The driver is asked
// once per device: the question costs a launch about a microsecond.
template <auto kKernel>
cudaError_t allow_shared_memory(int bytes) {
    static std::atomic<uint64_t> allowed;  // a bit for each of the first 64 devices
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess)
        return error;
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if (allowed.load(std::memory_order_relaxed) & bit)
        return cudaSuccess;
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess)
        allowed.fetch_or(bit, std::memory_order_relaxed);
    return error;
}

class LaunchConfig {
public:
    LaunchConfig(dim3 grid, int threads, size_t smem_bytes, cudaStream_t stream) {
        config_.gridDim = grid;
        config_.blockDim = dim3(threads);
        config_.dynamicSmemBytes = smem_bytes;
        config_.stream = stream;
        config_.attrs = attributes_;
        add(cudaLaunchAttributeProgrammaticStreamSerialization)
            .programmaticStreamSerializationAllowed = 1;
    }
    LaunchConfig(const LaunchConfig&) = delete;
    LaunchConfig& operator=(const LaunchConfig&) = delete;

    // CTAs, along x.
    void cluster(int size) {
        add(cudaLaunchAttributeClusterDimension).clusterDim = {static_cast<unsigned>(size), 1, 1};
    }

    // All CTAs are resident at the same time, or the launch fails.
    void cooperative() {
        add(cudaLaunchAttributeCooperative).cooperative = 1;
    }

    const cudaLaunchConfig_t* get() const {
        return &config_;
    }

private:
    cudaLaunchAttributeValue& add(cudaLaunchAttributeID id) {
        cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
        attribute.id = id;
        return attribute.val;
    }

    cudaLaunchConfig_t config_{};
    cudaLaunchAttribute attributes_[3]{};
};

// Starts when the kernels in front of it have ended.
template <typename... Params, typename... Args>
cudaError_t launch_in_order(
    void (*kernel)(Params...),
    dim3 grid,
    int threads,
    size_t smem_bytes,
    cudaStream_t stream,
    const Args&... args) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = smem_bytes;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, args...);
}

// How many clusters of `size` CTAs the current device holds at once, 0 if none. Takes long.
inline int clusters_at_once(const void* kernel, int size, int threads, int smem_bytes) {
    LaunchConfig config(size, threads, smem_bytes, nullptr);
    config.cluster(size);
    int clusters = 0;
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
    if (error == cudaSuccess)
        error = cudaOccupancyMaxActiveClusters(&clusters, kernel, config.get());
    if (error == cudaSuccess)
        return clusters;
    cudaGetLastError();  // the answer is 0; left in place it would be taken for another call's
    return 0;
}

}  // namespace lowbit::cuda
