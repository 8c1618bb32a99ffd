// The host's side of nf4_lora_matmul_large_kernel.cuh: what is resident, what lies where in the
// workspace, what TMA reads, and the launch.
#pragma once

#include <algorithm>
#include <limits>

#include "launch_config.h"
#include "nf4_lora_matmul_large_kernel.cuh"
#include "nf4_lora_matmul_large_prepare.cuh"
#include "tensor_map.h"

namespace lowbit::cuda {
namespace {

// How many clusters the current device holds at once; 0 if too few for the kernel. That is not
// kept: a green context may have room for few where the device has more.
template <class Product>
int resident_clusters() {
    static Answers answers;
    return once_per_device(answers, [] {
        if (!device_is_sm90())
            return 0;
        int clusters = std::numeric_limits<int>::max();
        for (const void* kernel :
             {reinterpret_cast<const void*>(nf4_lora_matmul_large_kernel<__nv_bfloat16, Product>),
              reinterpret_cast<const void*>(nf4_lora_matmul_large_kernel<__half, Product>)})
            clusters = std::min(clusters, clusters_at_once(kernel, kCtas, kThreads, kSmemBytes));
        return clusters < kLeastClusters ? 0 : clusters;
    });
}

// Offsets of the parts of the workspace, each 256-byte aligned.
struct Workspace {
    int64_t z_scaled;  // behind the counters
    int64_t factor;    // copy of the low-rank factor, if TMA cannot take it as it is
    int64_t ring;
    int64_t end;
};

inline Workspace lay_out(const Plan& plan, int64_t z_bytes, int64_t factor_bytes) {
    auto aligned = [](int64_t bytes) { return ceil_div(bytes, 256) * 256; };
    Workspace space{};
    space.z_scaled = aligned(int64_t{counters(plan)} * 4);
    space.factor = space.z_scaled + aligned(z_bytes);
    space.ring = ceil_div(space.factor + aligned(factor_bytes), 1024) * 1024;
    space.end = space.ring + int64_t{ring_line(plan, plan.slots, 0)} * kLineBytes;
    return space;
}

inline void place_counters(Params& p, uint8_t* workspace) {
    p.ready = reinterpret_cast<uint32_t*>(workspace);
    p.done = p.ready + p.plan.waves * p.plan.chunks;
    p.z_ready = p.done + p.plan.waves * p.plan.chunks;
    p.gradients.finished = p.z_ready + p.plan.token_tiles;
}

// Of [rows][columns], with boxes [box_rows][64].
inline bool make_map(
    CUtensorMap& map, Dtype dtype, const void* data, int64_t rows, int64_t columns, int box_rows) {
    return make_tensor_map(map, tensor_map_type(dtype), data, rows, columns, {box_rows, kLine}) ==
           cudaSuccess;
}

inline bool make_ring_maps(TensorMaps& maps, Dtype dtype, const Plan& plan, const uint8_t* ring) {
    const int64_t lines = ring_line(plan, plan.slots, 0);
    return make_map(maps.ring_load, dtype, ring, lines, kLine, kCtaRows) &&
           make_map(maps.ring_store, dtype, ring, lines, kLine, kTaskLanes);
}

template <typename T, class Product>
cudaError_t launch_main(const TensorMaps& maps, const Params& p, cudaStream_t stream) {
    LaunchConfig config(kCtas * p.plan.clusters, kThreads, kSmemBytes, stream);
    config.cooperative();
    return cudaLaunchKernelEx(config.get(), nf4_lora_matmul_large_kernel<T, Product>, maps, p);
}

}  // namespace
}  // namespace lowbit::cuda
