// How launchers ask a device for the clusters that it holds (launch_config.h), before a stand-in
// for the runtime. Ends with 1 and a line at the first wrong answer. See test_plans.py.
#include <cstdio>
#include <cstdlib>

#include "cuda/launch_config.h"

using namespace lowbit::cuda;

namespace {

// The stand-in: a device, its SMs, how many clusters of eight it holds, and what it was asked.
int device = 0, sms = 132, eights = 15, questions = 0;
bool answers_fail = false, in_green = false;

void expect(bool right, const char* what) {
    if (right)
        return;
    std::printf("%s\n", what);
    std::exit(1);
}

ClusterRoom ask(Answers& answers) {
    return room_for_clusters(answers, nullptr, 8, 640, 1000);
}

// Since CUDA 12.5.
CUresult context_of(CUstream, CUcontext*, CUgreenCtx* green) {
    *green = in_green ? reinterpret_cast<CUgreenCtx>(&in_green) : nullptr;
    return CUDA_SUCCESS;
}

}  // namespace

extern "C" {
cudaError_t cudaGetDriverEntryPointByVersion(
    const char*,
    void** entry,
    unsigned,
    unsigned long long,
    cudaDriverEntryPointQueryResult* result) {
    *entry = reinterpret_cast<void*>(context_of);
    *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* current) {
    *current = device;
    return device < 0 ? cudaErrorNoDevice : cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = sms;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
    return cudaSuccess;
}
cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
cudaError_t
cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
    questions++;
    int size = 1;
    for (unsigned i = 0; i < config->numAttrs; i++)
        if (config->attrs[i].id == cudaLaunchAttributeClusterDimension)
            size = static_cast<int>(config->attrs[i].val.clusterDim.x);
    *clusters = size == 8 ? eights : sms / size;
    return answers_fail ? cudaErrorInvalidValue : cudaSuccess;
}
}

int main() {
    static Answers answers, others;
    for (int i = 0; i < 2; i++) {
        const ClusterRoom room = ask(answers);
        expect(room.cluster == 8 && room.clusters == 15, "clusters of eight");
        expect(questions == 1, "asked again");
    }
    device = 1, sms = 16, eights = 0;
    expect(ask(answers).cluster == 4, "a device without clusters of eight");
    device = 2, answers_fail = true;
    expect(ask(answers).cluster == 1 && ask(answers).clusters == 16, "a device that does not say");
    for (const int unknown : {-1, 64}) {
        device = unknown;
        expect(ask(answers).cluster == 1, "a device that nothing is kept of");
    }
    device = 0;
    int calls = 0;
    const auto find = [&] { return ++calls == 1 ? 0 : 66; };
    expect(once_per_device(others, find) == 0, "no answer");
    for (int i = 0; i < 2; i++)
        expect(once_per_device(others, find) == 66 && calls == 2, "an answer after none");
    device = 3;
    const auto late = [&] {
        others.of_device[3] = 5;  // another thread was faster
        return 7;
    };
    expect(once_per_device(others, late) == 5, "two answers");
    static Answers rooms;
    device = 4, in_green = true, calls = 0;
    int room = 2;
    const auto find_room = [&] { return calls++, room; };
    for (int i = 1; i <= 2; i++)
        expect(
            once_per_whole_device(rooms, nullptr, find_room) == 2 && calls == i,
            "the room of a green context");
    in_green = false, room = 33;
    for (int i = 0; i < 2; i++)
        expect(
            once_per_whole_device(rooms, nullptr, find_room) == 33 && calls == 3,
            "the device's room after a green context's");
    in_green = true;
    expect(once_per_whole_device(rooms, nullptr, find_room) == 33 && calls == 3, "a kept room");
    std::printf("%d\n", questions);
    return 0;
}
