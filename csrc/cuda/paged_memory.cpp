// Allocation, movement and queries of paged memory (paged_memory.h).
//
// CUDA 13 replaced device numbers by cudaMemLocation in the calls that move managed memory.

#include "paged_memory.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <memory>

namespace lowbit::cuda {
namespace {

// DLPack's managed tensor, version 0, whose layout is fixed. torch's header of it is closed to code
// that uses the stable ABI.
struct DLManagedTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t type_code, type_bits;
    uint16_t type_lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
    void* manager_ctx;
    void (*deleter)(DLManagedTensor*);
};
constexpr int32_t kDeviceCuda = 2;
constexpr uint8_t kTypeUnsigned = 1;

struct Block {
    DLManagedTensor tensor;
    int64_t shape;
    bool managed;
};

// cudaFree waits for the kernels that still use the memory. An error means that the context is gone
// with everything in it. On the memory's device: any thread may come here, and the runtime would
// make a context on the one that is current there.
void release(DLManagedTensor* tensor) {
    std::unique_ptr<Block> block(static_cast<Block*>(tensor->manager_ctx));
    void* data = block->tensor.data;
    try {
        const torch::stable::accelerator::DeviceGuard guard(block->tensor.device_id);
        if (block->managed)
            cudaFree(data);
        else
            cudaFreeHost(data);
    } catch (...) {
    }
}

#if CUDART_VERSION >= 13000
cudaMemLocation to_location(int location) {
    cudaMemLocation result{};
    result.type = location == kHost ? cudaMemLocationTypeHost : cudaMemLocationTypeDevice;
    result.id = location == kHost ? 0 : location;
    return result;
}
#else
int to_location(int location) {
    return location == kHost ? cudaCpuDeviceId : location;
}
#endif

// An error of one of these calls is reported by its return value; left in place it would also make
// the next kernel launch fail.
int reported(cudaError_t error) {
    if (error != cudaSuccess)
        cudaGetLastError();
    return error;
}

cudaMemoryAdvise to_advice(int advice, bool set) {
    switch (static_cast<Advice>(advice)) {
    case Advice::kPreferredLocation:
        return set ? cudaMemAdviseSetPreferredLocation : cudaMemAdviseUnsetPreferredLocation;
    case Advice::kAccessedBy:
        return set ? cudaMemAdviseSetAccessedBy : cudaMemAdviseUnsetAccessedBy;
    default:
        return set ? cudaMemAdviseSetReadMostly : cudaMemAdviseUnsetReadMostly;
    }
}

}  // namespace
}  // namespace lowbit::cuda

using namespace lowbit::cuda;

int lowbit_new_tensor(int managed, size_t bytes, int device, void** dl_managed_tensor) {
    void* data = nullptr;
    const cudaError_t error = managed ? cudaMallocManaged(&data, bytes, cudaMemAttachGlobal)
                                      : cudaHostAlloc(&data, bytes, cudaHostAllocPortable);
    if (error != cudaSuccess)
        return reported(error);
    Block* block = new Block{};
    block->shape = static_cast<int64_t>(bytes);
    block->managed = managed != 0;
    DLManagedTensor& tensor = block->tensor;
    tensor.data = data;
    tensor.device_type = kDeviceCuda;
    tensor.device_id = device;
    tensor.ndim = 1;
    tensor.type_code = kTypeUnsigned;
    tensor.type_bits = 8;
    tensor.type_lanes = 1;
    tensor.shape = &block->shape;
    tensor.manager_ctx = block;
    tensor.deleter = release;
    *dl_managed_tensor = &block->tensor;
    return cudaSuccess;
}

int lowbit_prefetch(const void* data, size_t bytes, int location, void* stream) {
    const auto queue = static_cast<cudaStream_t>(stream);
#if CUDART_VERSION >= 13000
    return reported(cudaMemPrefetchAsync(data, bytes, to_location(location), 0, queue));
#else
    return reported(cudaMemPrefetchAsync(data, bytes, to_location(location), queue));
#endif
}

int lowbit_advise(const void* data, size_t bytes, int advice, int set, int location) {
    return reported(cudaMemAdvise(data, bytes, to_advice(advice, set != 0), to_location(location)));
}

int lowbit_last_location(const void* data, size_t bytes, int* location) {
    int device = cudaInvalidDeviceId;
    const cudaError_t error = cudaMemRangeGetAttribute(
        &device, sizeof(device), cudaMemRangeAttributeLastPrefetchLocation, data, bytes);
    *location = device == cudaCpuDeviceId       ? kHost
                : device == cudaInvalidDeviceId ? kUnknown
                                                : device;
    return reported(error);
}

int lowbit_copy(void* to, const void* from, size_t bytes, void* stream) {
    const auto queue = static_cast<cudaStream_t>(stream);
    return reported(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, queue));
}

int lowbit_pages(int device, int* yes) {
    return reported(cudaDeviceGetAttribute(yes, cudaDevAttrConcurrentManagedAccess, device));
}

const char* lowbit_error_text(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}
