// select: rank the chunks of a choice and keep exactly N tokens.
//
// R = N - W - s tokens are left for chunks, best chunk first. No sort is needed: a radix search finds T, the score of
// the chunk in which the budget runs out. For that, every chunk adds its length, not 1, to the bin of its digit. Chunks
// above T are taken whole. Chunks equal to T share what is left, lower position first, so that the last one may be cut.
// Prefix sums in position order give every chunk its slots, so that the output is ascending.
//
//   chunk      0    1    2    3    4        R = 12, lengths 5
//   score     .3   .9   .5   .5   .1        T = .5: chunk 1 is above, 7 tokens are left for the two that equal T
//   taken      0    5    5    2    0        slots  s+0  s+5  s+10
//
// Keys and lengths are read once, into shared memory where they fit. Several blocks may share a long row: each searches
// T for itself, and they divide what is written. Only integers are added, so atomics do not disturb the order: the
// result is the same on every run and for every number of blocks.
#include "chunks.cuh"
#include "launch.cuh"
#include "scan.cuh"

namespace chunkkv {
namespace {

constexpr int kThreads = 1024;
constexpr int kBins = 2048;  // 11 bits of the key: sign, exponent and two bits of the mantissa, which spreads scores
constexpr int kBinsPerThread = kBins / kThreads;
constexpr int kPasses = 3;
constexpr int kMostStaged = 14 * 1024;  // chunks whose keys and lengths fit in shared memory on every architecture
constexpr int kMostShares = 8;          // blocks of one choice
constexpr int kChunksPerShare = 1024;
constexpr size_t kStagedBytes = sizeof(uint32_t) + sizeof(uint16_t);

struct SelectArgs {
    SelectParams params;
    int32_t shares;
    int32_t staged;  // chunks that shared memory has room for
};

/// Unsigned order of keys = order of scores; -0 equals +0, NaN is lowest of all.
__device__ uint32_t rankingKey(float score) {
    if (score != score) return 0;
    const uint32_t bits = __float_as_uint(score + 0.0f);
    return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}

/// The chunks of one choice, each with the score it is ranked by.
class Ranked {
  public:
    ChunkSpans spans;

    __device__ Ranked(const ChunkSpans& spans_, const float* scores, int32_t staged, uint32_t* room)
        : spans(spans_), scores_(scores), keys_(spans_.count <= staged ? room : nullptr) {
        lengths_ = reinterpret_cast<uint16_t*>(room + staged);
    }

    /// Copy keys and lengths to shared memory; a barrier must follow.
    __device__ void stage() {
        if (keys_ == nullptr) return;
#pragma unroll 4
        for (int32_t chunk = threadIdx.x; chunk < spans.count; chunk += kThreads) {
            keys_[chunk] = rankingKey(scores_[chunk]);
            lengths_[chunk] = static_cast<uint16_t>(spans.length(chunk));
        }
    }

    __device__ uint32_t key(int32_t chunk) const { return keys_ ? keys_[chunk] : rankingKey(scores_[chunk]); }
    __device__ int32_t length(int32_t chunk) const { return keys_ ? lengths_[chunk] : spans.length(chunk); }

  private:
    const float* scores_;
    uint32_t* keys_;  // null where the chunks do not fit
    uint16_t* lengths_;
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
            if (((key ^ cut.key) & known) == 0) atomicAdd(&bins[(key & ~known) >> shift], ranked.length(chunk));
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

/// Write the tokens of the chosen chunks, ascending, to the slots [s, end_slot). A thread owns neighbouring chunks, an
/// odd number of them, so that the threads of a warp read different banks of shared memory. Of these, this block writes
/// every shares-th.
__device__ void writeChosen(const Ranked& ranked, const Cut& cut, int32_t* kept, int32_t end_slot, int32_t share,
                            int32_t shares, ScanWord* warp_totals) {
    const int32_t count = ranked.spans.count, each = (count + kThreads - 1) / kThreads | 1;
    const int64_t begin = static_cast<int64_t>(threadIdx.x) * each;
    const int32_t first = static_cast<int32_t>(begin < count ? begin : count);
    const int32_t behind = first + each < count ? first + each : count;
    int32_t above = 0, equal = 0;
    for (int32_t chunk = first; chunk < behind; ++chunk) {
        const uint32_t key = ranked.key(chunk);
        above += key > cut.key ? ranked.length(chunk) : 0;
        equal += key == cut.key ? ranked.length(chunk) : 0;
    }
    ScanWord total;
    const ScanWord before = exclusiveScan<kThreads>(packed(above, equal), warp_totals, total, Sum());
    above = highOf(before);
    equal = lowOf(before);
    for (int32_t chunk = first; chunk < behind; ++chunk) {
        const uint32_t key = ranked.key(chunk);
        if (key < cut.key) continue;
        const int32_t length = ranked.length(chunk);
        const int32_t given = static_cast<int32_t>(clampTo(equal, 0, cut.to_give));
        const int32_t taken = key > cut.key ? length : static_cast<int32_t>(clampTo(cut.to_give - given, 0, length));
        const int32_t slot = ranked.spans.first + above + given, start = ranked.spans.start(chunk);
        if ((chunk - first) % shares == share)
            for (int32_t i = 0; i < taken && slot + i < end_slot; ++i) kept[slot + i] = start + i;
        above += key > cut.key ? length : 0;
        equal += key == cut.key ? length : 0;
    }
}

/// grid: x = row, y = share, z = choice.
__global__ void __launch_bounds__(kThreads, 1) selectKernel(const __grid_constant__ SelectArgs args) {
    SHARED(int32_t, bins, kBins);
    SHARED(int32_t, found, 2);
    SHARED(ScanWord, warp_totals, kThreads / 32);
    DYNAMIC_SHARED(uint32_t, room);
    const SelectParams& params = args.params;
    const auto row = static_cast<int32_t>(blockIdx.x), share = static_cast<int32_t>(blockIdx.y);
    const auto choice = static_cast<int32_t>(blockIdx.z);
    const int32_t length = rowLength(params.rows, row);
    const int32_t wanted = rowKept(params.rows, params.settings, row, length);
    const RowPart slots = rowPart(params.rows, row, length, params.max_kept, choice, params.choices);
    const int32_t stored = wanted < slots.count ? wanted : slots.count;
    int32_t* kept = params.kept_indices + slots.first;

    // What does not depend on scores: sinks, window and the entries after N; or the whole row. A class that keeps
    // recent tokens has no chunks: all that is not a sink counts as its window.
    const bool recent = keepsRecent(params.settings);
    const int32_t head = wanted == length ? length : params.settings.sinks;
    const int32_t tail = wanted == length ? length : recent ? head : wanted - params.settings.window;
    for (int32_t slot = share * kThreads + static_cast<int32_t>(threadIdx.x); slot < slots.count;
         slot += args.shares * kThreads) {
        if (slot >= stored)
            kept[slot] = -1;
        else if (slot < head)
            kept[slot] = slot;
        else if (slot >= tail)
            kept[slot] = length - wanted + slot;
    }
    if (threadIdx.x == 0 && share == 0 && choice == 0) params.kept_lengths[row] = stored;
    if (wanted == length || recent) return;

    // min_tokens >= W + s + c, so at least c tokens are left to give, and fewer than there are.
    const RowPart table = rowPart(params.rows, row, length, params.max_chunks);
    const RowPart chunks = rowPart(params.rows, row, length, params.max_chunks, choice, params.choices);
    Ranked ranked(chunkSpans(params.settings, params.chunk_starts, params.num_chunks, table, row, length),
                  params.chunk_scores + chunks.first, args.staged, room);
    ranked.stage();
    __syncthreads();
    const Cut cut = findCut(ranked, tail - head, bins, found, warp_totals);
    writeChosen(ranked, cut, kept, tail < slots.count ? tail : slots.count, share, args.shares, warp_totals);
}

}  // namespace

LaunchStatus launchSelect(const SelectParams& params, void* stream) {
    SelectArgs args{};
    args.params = params;
    args.staged = params.max_chunks < kMostStaged ? (params.max_chunks + 1) / 2 * 2 : kMostStaged;
    args.shares = static_cast<int32_t>(clampTo(params.max_chunks / kChunksPerShare, 1, kMostShares));
    const dim3 grid(static_cast<unsigned>(params.rows.batch), static_cast<unsigned>(args.shares),
                    static_cast<unsigned>(params.choices));
    return launch(selectKernel, grid, dim3(kThreads), args.staged * kStagedBytes, stream, args);
}

}  // namespace chunkkv
