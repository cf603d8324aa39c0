// boundaries: where the delimiter chunks of a prompt start. One block per row, once for all layers.
//
// A chunk starts at s, after a delimiter, and after c tokens without one. The last rule looks sequential but is not:
// within a run that begins at position r (s, or behind a delimiter) the starts are r, r + c, r + 2c, ... So a running
// maximum gives every position its r, and a running sum of "p is a start" gives every start its number.
#include "chunks.cuh"
#include "launch.cuh"
#include "scan.cuh"

namespace chunkkv {
namespace {

constexpr int kThreads = 1024;
constexpr int kItems = 8;  // consecutive positions per thread

struct TokenIds {
    const BoundariesParams& params;
    RowPart part;

    __device__ bool isDelimiter(int32_t position) const {
        if (position >= part.count) return false;
        const int32_t id = params.token_ids[part.first + position];
        if (params.delimiter_bitmap == nullptr) return id != 0;
        return isDelimiterId(id, params.delimiter_bitmap, params.vocab_size);
    }
};

__global__ void boundariesKernel(const __grid_constant__ BoundariesParams params) {
    SHARED(ScanWord, warp_totals, kThreads / 32);
    const int32_t row = blockIdx.x;
    const Settings& settings = params.settings;
    const int32_t length = rowLength(params.rows, row);
    const int32_t end = length - settings.window;
    const RowPart part = rowPart(params.rows, row, length, params.max_chunks);
    int32_t* starts = params.chunk_starts + firstChunkStart(part, row);
    const TokenIds ids{params, rowPart(params.rows, row, length, params.rows.max_length)};

    ScanWord run_start = 0;  // begin of the run that reaches the tile, known from earlier tiles
    int32_t count = 0;
    for (int32_t tile = settings.sinks; tile < end; tile += kThreads * kItems) {
        const int32_t first = tile + static_cast<int32_t>(threadIdx.x) * kItems;
        uint32_t begins_run = 0;
        int32_t own_run = 0;
        for (int i = 0; i < kItems; ++i) {
            const int32_t position = first + i;
            if (position < end && (position == settings.sinks || ids.isDelimiter(position - 1))) {
                begins_run |= 1u << i;
                own_run = position;
            }
        }
        ScanWord last_run;
        const ScanWord lower_run = exclusiveScan<kThreads>(own_run, warp_totals, last_run, Max());
        int32_t run = static_cast<int32_t>(Max()(run_start, lower_run));
        run_start = Max()(run_start, last_run);

        uint32_t is_start = 0;
        for (int i = 0; i < kItems; ++i) {
            const int32_t position = first + i;
            if (begins_run >> i & 1u) run = position;
            if (position < end && (position - run) % settings.chunk_size == 0) is_start |= 1u << i;
        }
        ScanWord tile_count;
        int32_t number =
            count + static_cast<int32_t>(exclusiveScan<kThreads>(__popc(is_start), warp_totals, tile_count, Sum()));
        count += static_cast<int32_t>(tile_count);
        for (int i = 0; i < kItems; ++i) {
            if ((is_start >> i & 1u) == 0) continue;
            if (number < part.count) starts[number] = first + i;
            ++number;
        }
    }
    if (threadIdx.x == 0) {
        if (count > part.count) count = part.count;
        starts[count] = end > 0 ? end : 0;
        params.num_chunks[row] = count;
    }
}

}  // namespace

LaunchStatus launchBoundaries(const BoundariesParams& params, void* stream) {
    return launch(boundariesKernel, dim3(params.rows.batch), dim3(kThreads), 0, stream, params);
}

}  // namespace chunkkv
