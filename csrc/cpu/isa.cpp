// Detection and selection of the instruction-set level; isa.h explains the levels and how kernels
// use them.

#include "isa.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if LOWBIT_CPU_X86
#include <cpuid.h>
#endif
#if LOWBIT_CPU_X86 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lowbit::cpu {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512_bf16", "amx"};
constexpr int kLevels = 5;

#if LOWBIT_CPU_X86

struct Registers {
    uint32_t a = 0, b = 0, c = 0, d = 0;
};

// Zeros when the processor does not have the leaf.
Registers cpuid(uint32_t leaf, uint32_t subleaf) {
    Registers r;
    __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
    return r;
}

bool has_bits(uint64_t value, uint64_t bits) {
    return (value & bits) == bits;
}

constexpr uint32_t bit(int i) {
    return uint32_t{1} << i;
}

// Which register states the operating system saves on a context switch. Only valid when cpuid
// reports OSXSAVE.
uint64_t read_xcr0() {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t{high} << 32) | low;
}

Isa machine_isa() {
    const Registers leaf1 = cpuid(1, 0);
    constexpr uint32_t kFma = bit(12), kOsXsave = bit(27), kAvx = bit(28), kF16c = bit(29);
    if (!has_bits(leaf1.c, kFma | kOsXsave | kAvx | kF16c))
        return Isa::kGeneric;

    const uint64_t xcr0 = read_xcr0();
    constexpr uint64_t kXmmYmm = 0x6, kOpmaskZmm = 0xE0, kTiles = 0x60000;
    const Registers leaf7 = cpuid(7, 0);
    constexpr uint32_t kAvx2 = bit(5), kAvx512F = bit(16), kAvx512Dq = bit(17), kAvx512Bw = bit(30),
                       kAvx512Vl = bit(31);
    if (!has_bits(xcr0, kXmmYmm) || !has_bits(leaf7.b, kAvx2))
        return Isa::kGeneric;
    if (!has_bits(xcr0, kOpmaskZmm) ||
        !has_bits(leaf7.b, kAvx512F | kAvx512Dq | kAvx512Bw | kAvx512Vl)) {
        return Isa::kAvx2;
    }
    constexpr uint32_t kAvx512Bf16 = bit(5), kAmxBf16 = bit(22), kAmxTile = bit(24);
    if (leaf7.a < 1 || !has_bits(cpuid(7, 1).a, kAvx512Bf16))
        return Isa::kAvx512;
    if (!has_bits(xcr0, kTiles) || !has_bits(leaf7.d, kAmxBf16 | kAmxTile)) {
        return Isa::kAvx512Bf16;
    }
    return Isa::kAmx;
}

// Linux keeps the 8 KiB of tile data out of a process until the process asks for it; the grant
// covers all its threads. It can be refused (a seccomp filter, an alternate signal stack that is
// too small), and then a tile instruction would fault.
bool request_tile_permission() {
#if defined(__linux__)
    constexpr long kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
    return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
#else
    return false;
#endif
}

#else

Isa machine_isa() {
    return Isa::kGeneric;
}
bool request_tile_permission() {
    return false;
}

#endif

Isa parse(const std::string& name, const char* source) {
    for (int i = 0; i < kLevels; ++i) {
        if (name == kNames[i])
            return static_cast<Isa>(i);
    }
    throw std::runtime_error(
        std::string(source) + " must be one of generic, avx2, avx512, avx512_bf16, amx, got \"" +
        name + "\"");
}

Isa find_max_isa() {
    Isa isa = machine_isa();
    const char* cap = std::getenv("LOWBIT_CPU_ISA");
    if (cap != nullptr && *cap != '\0') {
        const Isa limit = parse(cap, "environment variable LOWBIT_CPU_ISA");
        if (limit < isa)
            isa = limit;
    }
    // After the cap: a process that does not want tiles does not ask for them (they enlarge its
    // signal frames).
    if (isa == Isa::kAmx && !request_tile_permission())
        isa = Isa::kAvx512Bf16;
    return isa;
}

constexpr int kUnset = -1;
std::atomic<int> selected{kUnset};

}  // namespace

Isa max_isa() {
    static const Isa isa = find_max_isa();
    return isa;
}

Isa current_isa() {
    const int level = selected.load(std::memory_order_relaxed);
    return level == kUnset ? max_isa() : static_cast<Isa>(level);
}

const char* isa_name(Isa isa) {
    return kNames[static_cast<int>(isa)];
}

void set_isa(const std::string& name) {
    const Isa isa = parse(name, "set_isa: name");
    if (isa > max_isa()) {
        throw std::runtime_error(
            "set_isa: \"" + name + "\" is not available, the highest is \"" + isa_name(max_isa()) +
            "\" (processor, operating system, or LOWBIT_CPU_ISA)");
    }
    selected.store(static_cast<int>(isa), std::memory_order_relaxed);
}

}  // namespace lowbit::cpu
