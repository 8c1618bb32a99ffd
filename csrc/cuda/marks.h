// Words in a workspace that say that something has happened, without a launch in front that clears
// them: memory may hold anything, so a word says it by holding the launch's mark. Whoever has
// waited for a word sets it back, since the runs of a captured graph all have the same mark.
#pragma once

#include <atomic>
#include <cstdint>

namespace lowbit::cuda {

// No two launches of a process have the same mark, except runs of a captured graph: each step maps
// 64-bit numbers one to one. Memory that was never part of a workspace holds it with a probability
// of 2^-64 per word. None is 0.
inline uint64_t next_mark() {
    static std::atomic<uint64_t> launches;
    uint64_t mark = ++launches;
    mark = (mark ^ mark >> 30) * 0xbf58476d1ce4e5b9u;
    mark = (mark ^ mark >> 27) * 0x94d049bb133111ebu;
    return mark ^ mark >> 31;
}

// Words that a kernel sets when it has something that the next one waits for, each in one CTA.
struct Marks {
    uint64_t* words;  // null: there are none, and the kernel's end is waited for
    int count;
    uint64_t mark;
};

}  // namespace lowbit::cuda
