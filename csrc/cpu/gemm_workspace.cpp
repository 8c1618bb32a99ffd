// Workspace of the products: one arena per calling thread, used like a stack.

#include <cstdlib>
#include <new>

#include "gemm.h"
#include "memory.h"

namespace lowbit::cpu {
namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kHugePage = 2 << 20;

struct Arena {
    char* data = nullptr;
    int64_t used = 0;

    bool reserve() {
        if (data == nullptr) {
            data = static_cast<char*>(std::aligned_alloc(kHugePage, kArenaBytes));
            if (data != nullptr)
                prefer_huge_pages(data, kArenaBytes);
        }
        return data != nullptr;
    }
    bool owns(const void* pointer) const {
        const char* const p = static_cast<const char*>(pointer);
        return data != nullptr && p >= data && p < data + kArenaBytes;
    }
    ~Arena() {
        std::free(data);
    }
};

thread_local Arena arena;

}  // namespace

void* take_workspace(int64_t bytes) {
    if (bytes <= 0)
        return nullptr;
    bytes = (bytes + kLine - 1) / kLine * kLine;
    if (bytes <= kArenaBytes - arena.used && arena.reserve()) {
        void* const taken = arena.data + arena.used;
        arena.used += bytes;
        return taken;
    }
    void* const taken = std::aligned_alloc(kLine, static_cast<size_t>(bytes));
    if (taken == nullptr)
        throw std::bad_alloc();
    return taken;
}

void return_workspace(void* data) {
    if (data == nullptr)
        return;
    if (arena.owns(data)) {
        arena.used = static_cast<char*>(data) - arena.data;
    } else {
        std::free(data);
    }
}

}  // namespace lowbit::cpu
