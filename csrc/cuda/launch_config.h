// A launch that may start before the kernels in front of it in the stream have ended (programmatic
// dependent launch); the kernel waits for them itself.
#pragma once

#include <cuda_runtime.h>

namespace lowbit::cuda {

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

}  // namespace lowbit::cuda
