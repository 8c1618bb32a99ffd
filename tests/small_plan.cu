// Walks through plans of nf4_lora_matmul_small_sm90.cu on the host, and ends with 1 and a line at
// the first that is wrong. See test_plans.py.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cuda/nf4_lora_matmul_small_plan.h"

using namespace lowbit;
using namespace lowbit::cuda;

namespace {

// What CTAs store for others and what they wait for, as they walk their pieces from the end.
const char* check_hand_overs(const Shares& shares, int tiles, int ctas) {
    std::vector<int> units(tiles), stored(ctas), asked(ctas);
    for (int cta = 0; cta < ctas; cta++) {
        const Piece piece = piece_of(shares, cta);
        if (piece.end <= piece.begin)
            return "a CTA without a share";
        bool finished = false;
        for (int end = piece.end; end > piece.begin;) {
            const Segment s(piece.begin, end, shares);
            end -= s.count;
            units[s.tile] += s.count;
            if (!s.finishes) {
                if (finished)
                    return "a CTA that waits before it has stored";
                stored[cta]++;
                continue;
            }
            if (finishes_first(s, piece, shares) == finished)
                return "z is waited for once, at the first finished tile";
            finished = true;
            const int first = shares.pieces.piece_before(cta, s.tile * shares.units);
            for (int from = first; !s.whole && from < cta; from++)
                asked[from]++;
        }
        if (finishes_tiles(shares, cta) != finished)
            return "whom projectors tell";
        if (cta == ctas - 1 && !finished)
            return "nobody writes z_out";
    }
    for (int n : units) {
        if (n != shares.units)
            return "units of a tile";
    }
    for (int cta = 0; cta < ctas; cta++) {
        if (stored[cta] > 1 || asked[cta] != stored[cta])
            return "a word that nobody waits for, or two";
    }
    return nullptr;
}

// Stages of projectors, and what products read behind the last one.
template <int kTokens, int kRowGroups>
const char* check_ring(int r) {
    using Shape = Tile<kTokens, kRowGroups>;
    const int stages = project_stages<Shape>(r), bytes = project_stage_bytes<Shape>(r);
    const int last = kProjectRing + (4 * stages - 1) * bytes + Shape::kTokenBytes;
    const int read = last + (padded_rank(r) + kMaxRank) * kTokenRow;
    if (stages < 1 || stages > kMostProjectStages || bytes % 1024 != 0)
        return "stages of a projector";
    return read > Shape::kBytes || Shape::kBytes > 227 * 1024 ? "room of a projector" : nullptr;
}

const char* check_workspace(const LoraMatmulArgs& a, const Plan& plan) {
    const Workspace s = layout_workspace(a, plan);
    const size_t projectors = projectors_of(a), ctas = plan.ctas, word = sizeof(uint64_t);
    if (projectors * plan.tokens * padded_rank(a.r) * sizeof(float) > s.flags)
        return "partial z";
    if (s.flags + ctas * word > s.z_flags || s.z_flags + projectors * ctas * word > s.partials)
        return "flags";
    if (s.flags % word != 0 || s.z_flags % word != 0 || s.partials % 16 != 0)
        return "alignment";
    const size_t sums = size_t{64} * plan.row_groups * plan.tokens;
    const size_t partial =
        marks_sums(plan.tokens) ? sums / 2 * sizeof(MarkedPair) : sums * sizeof(float);
    return s.partials + ctas * partial > s.bytes ? "partials" : nullptr;
}

}  // namespace

int main() {
    std::mt19937 random(0);
    int shared_tiles = 0, wait_for_sms = 0;
    for (int i = 0; i < 20000; i++) {
        LoraMatmulArgs a{};
        a.M = 1 + random() % 64;
        a.w.N = 16 * (1 + random() % (1 << random() % 12));
        a.w.K = 64 * (1 + random() % (1 << random() % 10));
        a.r = random() % 4 == 0 ? 0 : 1 + random() % kMaxRank;
        a.lora_A = a.r > 0 && random() % 4 > 0 ? &a : nullptr;
        const int sms = 1 + random() % 160, projectors = projectors_of(a);
        const Plan plan = make_plan(a, sms);
        const int tiles = tiles_of(a, plan);
        shared_tiles += plan.ctas % tiles != 0 && plan.ctas > 1;
        const char* wrong = nullptr;
        if (plan.tokens < a.M || plan.ctas < 1 || plan.ctas > sms)
            wrong = "CTAs";
        wait_for_sms += plan.ctas > 1 && plan.ctas + projectors > sms;
        if (wrong == nullptr)
            wrong = check_hand_overs(
                make_shares(units_of(a, plan), tiles, plan.ctas), tiles, plan.ctas);
        if (wrong == nullptr)
            wrong = check_workspace(a, plan);
        for (const char* ring :
             {check_ring<8, 1>(a.r), check_ring<8, 2>(a.r), check_ring<8, 4>(a.r),
              check_ring<16, 1>(a.r), check_ring<16, 2>(a.r), check_ring<16, 4>(a.r),
              check_ring<32, 2>(a.r), check_ring<32, 4>(a.r), check_ring<64, 2>(a.r),
              check_ring<64, 4>(a.r)}) {
            if (wrong == nullptr && a.r > 0)
                wrong = ring;
        }
        if (wrong != nullptr) {
            std::printf(
                "%s: M %d, N %d, K %d, r %d, %d SMs, %d CTAs, %d row groups\n", wrong,
                static_cast<int>(a.M), static_cast<int>(a.w.N), static_cast<int>(a.w.K), a.r, sms,
                plan.ctas, plan.row_groups);
            return 1;
        }
    }
    std::printf("%d %d\n", shared_tiles, wait_for_sms);
}
