// Waiting for a word of marks.h on the device.
#pragma once

#include "ptx.cuh"

namespace lowbit::cuda {

// Waits until the word holds the mark, and clears it: the next run of a captured graph has the same
// mark and must not find it. No other thread waits for this word.
template <typename Mark>
__device__ __forceinline__ void wait_for_mark(Mark* flag, Mark mark) {
    while (load_acquire(flag) != mark) {
    }
    *flag = 0;
}

}  // namespace lowbit::cuda
