// Managed and pinned memory for tensors that the GPU reads but that need not lie on it.
//
// A plain C interface, called from lowbit/memory.py through ctypes: none of it has to do with
// operators. The caller has made the memory's device the current one: a stream that is null is that
// one's default stream. Every function returns a cudaError_t as an int. A new tensor comes as a
// DLManagedTensor, so that torch calls its deleter, and the memory goes back to the system, with
// the last reference. torch's memory pools could not do that: the caching allocator keeps freed
// blocks, and counts what it hands out against the memory of the card.
#pragma once

#include <cstddef>
#include <cstdint>

#define LOWBIT_C_API extern "C" __attribute__((visibility("default")))

namespace lowbit::cuda {

// Where memory lies, in calls that take or give a location: a device's index, or one of these.
constexpr int kHost = -1;
constexpr int kUnknown = -2;

enum class Advice : int { kPreferredLocation = 0, kAccessedBy = 1, kReadMostly = 2 };

}  // namespace lowbit::cuda

// bytes of new memory as a uint8 [bytes] CUDA tensor of `device`: managed, or else pinned memory of
// the host that is mapped into the GPU's address space.
LOWBIT_C_API int lowbit_new_tensor(int managed, size_t bytes, int device, void** dl_managed_tensor);

// Queue the move of [data, data + bytes) to a device or to the host.
LOWBIT_C_API int lowbit_prefetch(const void* data, size_t bytes, int location, void* stream);

// Set (or with set = 0 withdraw) an advice about [data, data + bytes).
LOWBIT_C_API int lowbit_advise(const void* data, size_t bytes, int advice, int set, int location);

// Where [data, data + bytes) was last prefetched to: a device, kHost, or kUnknown.
LOWBIT_C_API int lowbit_last_location(const void* data, size_t bytes, int* location);

// Queue a copy between any two addresses.
LOWBIT_C_API int lowbit_copy(void* to, const void* from, size_t bytes, void* stream);

// Whether host and device may touch managed memory at the same time, which paging needs.
LOWBIT_C_API int lowbit_pages(int device, int* yes);

LOWBIT_C_API const char* lowbit_error_text(int error);
