// select: rank the chunks of a row and keep exactly N tokens. One block per row.
//
// R = N - w - s tokens are left for chunks, best chunk first. No sort is needed: a radix search finds T, the score of
// the chunk in which the budget runs out. For that, every chunk adds its length, not 1, to the bin of its digit. Chunks
// above T are taken whole. Chunks equal to T share what is left, lower position first, so that the last one may be cut.
// Prefix sums in position order give every chunk its slots, so that the output is ascending.
//
//   chunk      0    1    2    3    4        R = 12, lengths 5
//   score     .3   .9   .5   .5   .1        T = .5: chunk 1 is above, 7 tokens are left for the two that equal T
//   taken      0    5    5    2    0        slots  s+0  s+5  s+10
//
// Only integers are added, so atomics do not disturb the order: the result is the same on every run.
#include "chunks.cuh"
#include "launch.cuh"
#include "scan.cuh"

namespace chunkkv {
namespace {

constexpr int kThreads = 1024;
constexpr int kBins = 2048;  // 11 bits of the key: sign, exponent and two bits of the mantissa, which spreads scores
constexpr int kBinsPerThread = kBins / kThreads;
constexpr int kPasses = 3;

/// Unsigned order of keys = order of scores; -0 equals +0, NaN is lowest of all.
__device__ uint32_t rankingKey(float score) {
    if (score != score) return 0;
    const uint32_t bits = __float_as_uint(score + 0.0f);
    return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}

/// The chunks of one row, each with the score it is ranked by.
struct Ranked {
    ChunkSpans spans;
    const float* scores;

    __device__ uint32_t key(int32_t chunk) const { return rankingKey(scores[chunk]); }
};

struct Cut {
    uint32_t key;     // T
    int32_t to_give;  // tokens left for the chunks whose key equals T
};

/// Find T, most significant digit first: each pass looks only at chunks that share the digits found so far.
__device__ Cut findCut(const Ranked& ranked, int32_t budget, int32_t* bins, int32_t* found, ScanWord* warp_totals) {
    Cut cut{0, budget};
    uint32_t known = 0;  // mask of the digits found so far
    for (int pass = 0; pass < kPasses; ++pass) {
        const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
        for (int bin = threadIdx.x; bin < kBins; bin += kThreads) bins[bin] = 0;
        if (threadIdx.x == 0) {
            found[0] = 0;
            found[1] = cut.to_give;
        }
        __syncthreads();
        for (int32_t chunk = threadIdx.x; chunk < ranked.spans.count; chunk += kThreads) {
            const uint32_t key = ranked.key(chunk);
            if (((key ^ cut.key) & known) == 0) atomicAdd(&bins[(key & ~known) >> shift], ranked.spans.length(chunk));
        }
        __syncthreads();
        const int highest = kBins - 1 - static_cast<int>(threadIdx.x) * kBinsPerThread;  // thread 0 holds the top bins
        int32_t own = 0;
        for (int i = 0; i < kBinsPerThread; ++i) own += bins[highest - i];
        ScanWord all;
        int32_t above = static_cast<int32_t>(exclusiveScan<kThreads>(own, warp_totals, all, Sum()));
        for (int i = 0; i < kBinsPerThread; ++i) {
            const int32_t here = bins[highest - i];
            if (above < cut.to_give && cut.to_give <= above + here) {  // true for one bin of the block
                found[0] = highest - i;
                found[1] = cut.to_give - above;
            }
            above += here;
        }
        __syncthreads();
        cut.key |= static_cast<uint32_t>(found[0]) << shift;
        cut.to_give = found[1];
        known |= 0xFFFFFFFFu << shift;
        __syncthreads();  // `bins` and `found` are read before the next pass clears them
    }
    return cut;
}

/// Write the tokens of the chosen chunks, ascending, to the slots [s, end_slot).
__device__ void writeChosen(const Ranked& ranked, const Cut& cut, int32_t* kept, int32_t end_slot,
                            ScanWord* warp_totals) {
    int32_t above = 0, equal = 0;  // tokens of the chunks of earlier tiles
    for (int32_t tile = 0; tile < ranked.spans.count; tile += kThreads) {
        const int32_t chunk = tile + static_cast<int32_t>(threadIdx.x);
        const bool exists = chunk < ranked.spans.count;
        const uint32_t key = exists ? ranked.key(chunk) : 0;
        const int32_t length = exists ? ranked.spans.length(chunk) : 0;
        const int32_t own_above = key > cut.key ? length : 0, own_equal = key == cut.key ? length : 0;
        ScanWord total;
        const ScanWord before = exclusiveScan<kThreads>(packed(own_above, own_equal), warp_totals, total, Sum());
        const int32_t equal_before = equal + lowOf(before);
        const int32_t given = static_cast<int32_t>(clampTo(equal_before, 0, cut.to_give));
        const int32_t taken = own_above + static_cast<int32_t>(clampTo(cut.to_give - given, 0, own_equal));
        const int32_t slot = ranked.spans.first + above + highOf(before) + given;
        const int32_t start = exists ? ranked.spans.start(chunk) : 0;
        for (int32_t i = 0; i < taken && slot + i < end_slot; ++i) kept[slot + i] = start + i;
        above += highOf(total);
        equal += lowOf(total);
    }
}

__global__ void __launch_bounds__(kThreads) selectKernel(const __grid_constant__ SelectParams params) {
    SHARED(int32_t, bins, kBins);
    SHARED(int32_t, found, 2);
    SHARED(ScanWord, warp_totals, kThreads / 32);
    const int32_t row = blockIdx.x, thread = threadIdx.x;
    const int32_t length = rowLength(params.rows, row);
    const int32_t wanted = rowKept(params.rows, params.settings, row, length);
    const RowPart slots = rowPart(params.rows, row, length, params.max_kept);
    const int32_t stored = wanted < slots.count ? wanted : slots.count;
    int32_t* kept = params.kept_indices + slots.first;

    // What does not depend on scores: sinks, window and the entries after N; or the whole row.
    const int32_t head = wanted == length ? length : params.settings.sinks;
    const int32_t tail = wanted == length ? length : wanted - params.settings.window;
    for (int32_t slot = thread; slot < slots.count; slot += kThreads) {
        if (slot >= stored)
            kept[slot] = -1;
        else if (slot < head)
            kept[slot] = slot;
        else if (slot >= tail)
            kept[slot] = length - wanted + slot;
    }
    if (thread == 0) params.kept_lengths[row] = stored;
    if (wanted == length) return;

    // min_tokens >= w + s + c, so at least c tokens are left to give, and fewer than there are.
    const RowPart chunks = rowPart(params.rows, row, length, params.max_chunks);
    const Ranked ranked{
        chunkSpans(params.settings, params.chunk_starts, params.num_chunks, chunks, row, length),
        params.chunk_scores + chunks.first,
    };
    const Cut cut = findCut(ranked, tail - head, bins, found, warp_totals);
    writeChosen(ranked, cut, kept, tail < slots.count ? tail : slots.count, warp_totals);
}

}  // namespace

LaunchStatus launchSelect(const SelectParams& params, void* stream) {
    return launch(selectKernel, dim3(params.rows.batch), dim3(kThreads), 0, stream, params);
}

}  // namespace chunkkv
