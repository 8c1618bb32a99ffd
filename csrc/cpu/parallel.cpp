// torch's thread pool behind two plain functions, so that kernel sources need no torch header.

#include <torch/csrc/stable/ops.h>

#include "common.h"

namespace lowbit::cpu {

void run_parallel(int64_t begin, int64_t end, int64_t grain, RangeFunction fn, void* context) {
    if (begin >= end)
        return;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, fn, context));
}

int num_threads() {
    return static_cast<int>(torch::stable::get_num_threads());
}

}  // namespace lowbit::cpu
