#include "memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lowbit::cpu {

void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
    constexpr int64_t kSmallest = int64_t{4} << 20;  // below, the system call is not worth it
    if (bytes < kSmallest)
        return;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
    const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
    const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) & ~(kHugePage - 1);
    // The result is ignored: it is advice.
    if (first < last)
        madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)data;
    (void)bytes;
#endif
}

}  // namespace lowbit::cpu
