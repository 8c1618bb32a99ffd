// The first product of the low-rank term: x lora_A^T, rounded for the caller and scaled for the
// second product.
#pragma once

#include <algorithm>

#include "launch_config.h"
#include "nf4_lora_matmul.h"

namespace lowbit::cuda {

// Most of an idle device, in clusters of eight if it can hold them.
ClusterRoom projection_room();

// By pairs of CTAs of a product's grid, which has clusters of two. No more of them than a warp of
// the others can ask at a time.
inline ClusterRoom projection_room_beside(int spare_sms) {
    constexpr int kPair = 2, kMostAsked = 32;
    return {kPair, std::min(spare_sms, kMostAsked) / kPair};
}

// Clusters take tokens by groups; some of their CTAs divide K for one group.
struct ProjectionTiling {
    int tokens;  // of a group, 64 to 256
    int parts;   // of K, each of a CTA; a power of two that divides the cluster
    int clusters;
    int passes;  // groups of a CTA, at most
};

// The cluster is a power of two. K is divided as far as one pass allows: every pass reads lora_A
// again and adds up.
inline ProjectionTiling tile_projection(int64_t M, ClusterRoom room) {
    constexpr int64_t kBox = 64, kMostTokens = 256;
    M = std::max<int64_t>(M, 1);
    int parts = room.cluster;
    while (parts > 1 && M > room.clusters * (room.cluster / parts) * kMostTokens)
        parts /= 2;
    const int64_t groups = room.clusters * (room.cluster / parts);  // at the same time
    const int64_t passes = ceil_div(M, groups * kMostTokens);
    const int64_t tokens = kBox * ceil_div(M, groups * passes * kBox);
    const int64_t clusters =
        std::min<int64_t>(room.clusters, ceil_div(M, tokens * (room.cluster / parts)));
    return {static_cast<int>(tokens), parts, static_cast<int>(clusters), static_cast<int>(passes)};
}

// Fills z_scaled [M, padded_rank(r)] of x's dtype from args.x and lora_A, or from args.z_in, and
// args.z_out unless null, on all SMs. r > 0, and M times padded_rank(r) is less than 2^31. A kernel
// launched after it as its programmatic dependent may start while this one runs: everything before
// it is complete by then, but z only after griddepcontrol.wait.
cudaError_t launch_lora_project(const LoraMatmulArgs& args, void* z_scaled, cudaStream_t stream);

}  // namespace lowbit::cuda
