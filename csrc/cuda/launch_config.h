// What launchers tell the driver: how much shared memory a kernel may take, and that a launch may
// start before the kernels in front of it in the stream have ended (programmatic dependent launch);
// the kernel waits for them itself. A launch returns its own error: cudaGetLastError may give one
// that somebody left unread long before.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cstdint>
#include <iterator>

#include "device.h"

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
        assert(config_.numAttrs < std::size(attributes_));
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

// Answers for each device; static, as it starts with zeros.
struct Answers {
    static constexpr int kDevices = 64;
    std::atomic<int> of_device[kDevices];
};

// What `find` says of the current device, asked once; 0 is not kept. Of threads that ask at the
// same time, perhaps in different contexts, the first decides for all: workspaces are laid out by
// it.
template <typename Find>
int once_per_device(Answers& answers, Find find) {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= Answers::kDevices)
        return 0;
    std::atomic<int>& known = answers.of_device[device];
    int found = known;
    if (found != 0)
        return found;
    const int own = find();
    return own == 0 || known.compare_exchange_strong(found, own) ? own : found;
}

// The same, but what is found for a stream of a green context is not kept: the device has more
// room. Of use where a call asks once, as the next answer may be another.
template <typename Find>
int once_per_whole_device(Answers& answers, cudaStream_t stream, Find find) {
    int found = 0;
    const int kept = once_per_device(answers, [&] {
        found = find();
        return in_green_context(stream) ? 0 : found;
    });
    return kept != 0 ? kept : found;
}

// Of a kernel beside a product whose CTAs come in pairs: clusters of four leave no pair of SMs
// broken.
constexpr int kBesideCluster = 4;

// CTAs of a cluster, one on each SM, and how many clusters there are at the same time.
struct ClusterRoom {
    int cluster;
    int clusters;
};

// Clusters of at most `most` CTAs that find room on an idle device. `most` is a power of two below
// 16, and so is the answer: kernels shift by its log2_of. How many depends on how the SMs are
// grouped: eights on 10 of 11 SMs of an H100. Half of the SMs may be lost before smaller clusters
// are better. Lets the kernel take the shared memory.
inline ClusterRoom
room_for_clusters(Answers& answers, const void* kernel, int most, int threads, int smem_bytes) {
    const int found = once_per_device(answers, [&] {
        const int sms = std::max(sm_count(), 1);
        for (int size = most; size > 1; size /= 2) {
            const int clusters = clusters_at_once(kernel, size, threads, smem_bytes);
            if (clusters > 0 && 2 * size * clusters >= sms)
                return 16 * clusters + size;
        }
        return 16 * sms + 1;
    });
    return found == 0 ? ClusterRoom{1, std::max(sm_count(), 1)}
                      : ClusterRoom{found % 16, found / 16};
}

}  // namespace lowbit::cuda
