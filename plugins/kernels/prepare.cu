// prepare: what a packed batch says about its rows and tokens, once for all layers.
//
//   row          0 context, L = 3    1 context, L = 2    2 generation            3 generation
//   row_starts   0                   3                   5                       6
//   positions    0  1  2             0  1                sequence_length - 1     sequence_length - 1
//
// Every row begins where all rows before it end: one block runs over the rows with a prefix sum. Then every token finds
// its row in row_starts, which ascend, by bisection. Only integers are added: the result is the same on every run.
#include "chunks.cuh"
#include "launch.cuh"
#include "scan.cuh"

namespace chunkkv {
namespace {

constexpr int kRowThreads = 1024;
constexpr int kTokenThreads = 256;

/// L of a row, clamped to [0, max_length].
__device__ int32_t promptLength(const PrepareParams& params, int32_t row) {
    return static_cast<int32_t>(clampTo(params.context_lengths[row], 0, params.max_length));
}

__device__ bool isContext(const PrepareParams& params, int32_t row) { return row < params.contexts; }

/// attention_lengths, kept_lengths and row_starts. One block.
__global__ void __launch_bounds__(kRowThreads) prepareRowsKernel(const __grid_constant__ PrepareParams params) {
    SHARED(ScanWord, warp_totals, kRowThreads / 32);
    const Settings& settings = params.settings;
    ScanWord tokens_before = 0;  // of the rows of earlier tiles
    for (int32_t tile = 0; tile < params.batch; tile += kRowThreads) {
        const int32_t row = tile + static_cast<int32_t>(threadIdx.x);
        const bool exists = row < params.batch;
        int32_t tokens = 0;
        if (exists) {
            const int32_t length = promptLength(params, row);
            const int32_t kept = keptTokens(settings, length, settings.keep_per_10k, settings.budget_tokens);
            const int32_t sequence = params.sequence_lengths[row];
            const int64_t compacted = static_cast<int64_t>(sequence) - (length - kept);
            tokens = isContext(params, row) ? length : 1;
            params.kept_lengths[row] = kept;
            params.attention_lengths[row] =
                isContext(params, row) ? sequence : static_cast<int32_t>(clampTo(compacted, 1, INT32_MAX));
        }
        ScanWord tile_tokens;
        const ScanWord lower = exclusiveScan<kRowThreads>(tokens, warp_totals, tile_tokens, Sum());
        const auto start = static_cast<int64_t>(tokens_before + lower);
        if (exists) params.row_starts[row] = static_cast<int32_t>(clampTo(start, 0, params.num_tokens));
        tokens_before += tile_tokens;
    }
}

/// The last row that begins at `token` or before it: rows without tokens begin where the next one does.
__device__ int32_t rowOf(const PrepareParams& params, int64_t token) {
    int32_t low = 0, behind = params.batch;
    while (behind - low > 1) {
        const int32_t middle = low + (behind - low) / 2;
        (params.row_starts[middle] <= token ? low : behind) = middle;
    }
    return low;
}

/// positions and is_delimiter. One thread per token.
__global__ void __launch_bounds__(kTokenThreads) prepareTokensKernel(const __grid_constant__ PrepareParams params) {
    const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokenThreads + threadIdx.x;
    if (token >= params.num_tokens) return;
    const int32_t row = rowOf(params, token);
    const auto place = static_cast<int32_t>(token - params.row_starts[row]);
    const bool context = isContext(params, row);
    const bool owned = place < (context ? promptLength(params, row) : 1);
    const int32_t last = params.sequence_lengths[row] > 0 ? params.sequence_lengths[row] - 1 : 0;
    params.positions[token] = !owned ? 0 : context ? place : last;
    if (params.is_delimiter != nullptr)
        params.is_delimiter[token] =
            isDelimiterId(params.token_ids[token], params.delimiter_bitmap, params.vocab_size) ? 1 : 0;
}

}  // namespace

LaunchStatus launchPrepare(const PrepareParams& params, void* stream) {
    if (params.batch == 0) return 0;
    const LaunchStatus status = launch(prepareRowsKernel, dim3(1), dim3(kRowThreads), 0, stream, params);
    if (status != 0) return status;
    const int64_t blocks = ceilDiv(params.num_tokens, kTokenThreads);
    return launch(prepareTokensKernel, dim3(static_cast<unsigned>(blocks)), dim3(kTokenThreads), 0, stream, params);
}

}  // namespace chunkkv
