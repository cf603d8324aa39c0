// compact: move the kept rows of K and V to slots 0..N-1, for any number of layers in one launch.
//
//   slot       0  1  2  3  4  5  6          one block owns one (layer, K or V, row, head, column slice)
//   kept       0  1  4  5  9 10 11          and walks the slots in tiles: load the sources of a tile,
//              └──tile──┘ └──tile──┘        barrier, store the tile.
//
// Why that is safe in place. kept is strictly ascending and not negative, so kept[j] >= j. A store of tile [t, t+T)
// writes slots below t+T. Every load of a later tile reads kept[j] >= j >= t+T: never a slot that an earlier tile has
// written. Inside a tile the barrier puts all loads before all stores. Blocks share no bytes: layer, K or V, row, head
// and column slice are different memory, also in a paged pool, where a slot of a row has exactly one address. Source
// and destination pages of a tile may be the same page: the argument holds for slots, whatever their pages.
// Two neighbouring tiles need no barrier between them: the loads of the later one and the stores of the earlier one
// touch different slots. Slots that already hold their row (kept[j] == j, such as the sinks) are neither read nor
// written.
//
// Out of place nothing can collide, so tiles are spread over blocks as well.
#include "chunkkv/layout.h"
#include "launch.cuh"

namespace chunkkv {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 8;                 // independent loads per thread
constexpr int kSliceBytes = 64;              // a DRAM access; narrower slices would read bytes they do not move
constexpr int kBlocksPerMultiprocessor = 4;  // rows are cut into slices while fewer blocks would run

struct CompactArgs {
    Rows rows;
    Layout in;
    Layout out;
    const int32_t* kept_indices;
    const int32_t* kept_lengths;
    const int32_t* kv_head_numbers;
    int32_t all_kv_heads;
    int32_t choices;
    int32_t max_kept;
    int32_t row_vectors;    // vectors in the D elements of a token
    int32_t slice_vectors;  // vectors of a column slice; the last one may be narrower
    int32_t slices;
    int32_t splits;  // blocks that share the tiles of one slice; 1 in place
    int32_t reserved;
    Layer layers[CHUNKKV_MAX_LAYERS];
};
static_assert(isPlain<CompactArgs> && sizeof(CompactArgs) <= 4096, "kernel parameters end at 4 KB before CUDA 12.1");

/// grid: x = (head, slice, split), y = row, z = (layer, K or V). Out of place there are two layouts to hold, which
/// takes registers, and more blocks than run at a time.
template <class Vector, bool kInPlace>
__global__ void __launch_bounds__(kThreads, kInPlace ? blocksThatFit(kBlocksPerMultiprocessor) : 3)
    compactKernel(const __grid_constant__ CompactArgs args) {
    const int32_t split = blockIdx.x % args.splits;
    const int32_t slice = blockIdx.x / args.splits % args.slices;
    const int32_t head = blockIdx.x / args.splits / args.slices;
    const int32_t row = blockIdx.y, kv = blockIdx.z % 2;
    const Layer& layer = args.layers[blockIdx.z / 2];
    const int32_t number = headNumber(args.kv_head_numbers, head, args.all_kv_heads);
    const TokenRows from = tokenRows(args.in, kv ? layer.value : layer.key, kv, row, number);
    const TokenRows to = kInPlace ? from : tokenRows(args.out, kv ? layer.value_out : layer.key_out, kv, row, head);

    const int32_t length = args.rows.lengths ? rowLength(args.rows, row) : args.rows.max_length;
    const int32_t choice = args.choices > 1 ? head : 0;
    const RowPart slots = rowPart(args.rows, row, length, args.max_kept, choice, args.choices);
    const int32_t most = slots.count < length ? slots.count : length;
    const bool every_slot = args.kept_lengths == nullptr;
    const int32_t kept = every_slot ? args.max_kept : static_cast<int32_t>(clampTo(args.kept_lengths[row], 0, most));
    const int32_t* indices = args.kept_indices + slots.first;
    if (kInPlace && kept == length) return;  // every token is where it belongs

    const int32_t first_column = slice * args.slice_vectors;
    const int32_t left = args.row_vectors - first_column;
    const int32_t width = left < args.slice_vectors ? left : args.slice_vectors;
    const int32_t thread = threadIdx.x;
    const int64_t column = (first_column + thread % width) * static_cast<int64_t>(sizeof(Vector));
    const int32_t slots_per_pass = kThreads / width;
    const int32_t own_slot = thread / width < slots_per_pass ? thread / width : kept;  // surplus threads own no slot
    const int32_t tile = slots_per_pass * kInFlight;

    for (int32_t first = split * tile; first < kept; first += args.splits * tile) {
        Vector held[kInFlight];
        int32_t source[kInFlight];
        uint32_t moves = 0;  // one bit for each; sources need not be kept for it
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            const int32_t slot = first + own_slot + i * slots_per_pass;
            source[i] = slot < kept ? indices[slot] : -1;
            if (every_slot && slot < kept && source[i] < 0) source[i] = 0;
            if (kInPlace && source[i] == slot) source[i] = -1;
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            if (source[i] < 0) continue;
            moves |= 1u << i;
            held[i] = *reinterpret_cast<const Vector*>(from.at(source[i]) + column);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            const int32_t slot = first + own_slot + i * slots_per_pass;
            char* target = moves >> i & 1u ? to.writable(slot) : nullptr;
            if (target != nullptr) *reinterpret_cast<Vector*>(target + column) = held[i];
        }
    }
}

template <class Vector>
LaunchStatus launchWith(const CompactParams& params, CompactArgs args, int32_t num_layers, void* stream) {
    const bool in_place = args.layers[0].key_out == nullptr;
    const int64_t blocks = int64_t{params.kv_heads} * params.rows.batch * num_layers * 2;
    args.row_vectors = params.row_bytes / static_cast<int32_t>(sizeof(Vector));
    const int64_t enough = int64_t{kBlocksPerMultiprocessor} * multiprocessors();
    const int64_t slices = in_place && blocks > 0 ? clampTo(enough / blocks, 1, args.row_vectors) : 1;
    const int32_t narrowest = kSliceBytes / static_cast<int32_t>(sizeof(Vector));
    const int64_t width = clampTo(ceilDiv(ceilDiv(args.row_vectors, slices), narrowest) * narrowest, 1, kThreads);
    args.slice_vectors = static_cast<int32_t>(width < args.row_vectors ? width : args.row_vectors);
    args.slices = static_cast<int32_t>(ceilDiv(args.row_vectors, args.slice_vectors));
    const bool all_slots = params.kept_lengths == nullptr || params.max_kept < params.rows.max_length;
    const int64_t most = all_slots && params.rows.max_length > 0 ? params.max_kept : params.rows.max_length;
    const int64_t tiles = ceilDiv(most, int64_t{kThreads / args.slice_vectors} * kInFlight);
    const int32_t strips = params.kv_heads * args.slices;
    args.splits = in_place ? 1 : static_cast<int32_t>(clampTo(tiles, 1, INT32_MAX / strips));
    const dim3 grid(strips * args.splits, most > 0 ? params.rows.batch : 0, num_layers * 2);
    const auto kernel = in_place ? compactKernel<Vector, true> : compactKernel<Vector, false>;
    return launch(kernel, grid, dim3(kThreads), 0, stream, args);
}

/// All addresses and strides of the call, combined by OR: its lowest bits tell the largest alignment that all share.
uint64_t addressBits(const CompactParams& params) {
    uint64_t bits = static_cast<uint64_t>(params.row_bytes);
    const bool in_place = params.layers[0].key_out == nullptr;
    for (const Layout* layout : {&params.layout, in_place ? &params.layout : &params.layout_out}) {
        bits |= layout->stride_token | layout->stride_head;
        bits |= layout->block_offsets ? layout->stride_block : layout->row_starts ? 0 : layout->stride_row;
    }
    for (int32_t i = 0; i < params.num_layers; ++i) {
        const Layer& layer = params.layers[i];
        for (const void* base : {layer.key, layer.value, static_cast<const void*>(layer.key_out),
                                 static_cast<const void*>(layer.value_out)})
            bits |= reinterpret_cast<uintptr_t>(base);
    }
    return bits;
}

}  // namespace

LaunchStatus launchCompact(const CompactParams& params, void* stream) {
    const uint64_t bits = addressBits(params);
    CompactArgs args{};
    args.rows = params.rows;
    args.in = params.layout;
    args.out = params.layout_out;
    args.kept_indices = params.kept_indices;
    args.kept_lengths = params.kept_lengths;
    args.kv_head_numbers = params.kv_head_numbers;
    args.all_kv_heads = params.all_kv_heads;
    args.choices = params.choices;
    args.max_kept = params.max_kept;
    for (int32_t first = 0; first < params.num_layers; first += CHUNKKV_MAX_LAYERS) {
        const int32_t left = params.num_layers - first;
        const int32_t count = left < CHUNKKV_MAX_LAYERS ? left : CHUNKKV_MAX_LAYERS;
        for (int32_t i = 0; i < count; ++i) args.layers[i] = params.layers[first + i];
        const LaunchStatus status = bits % 16 == 0  ? launchWith<uint4>(params, args, count, stream)
                                    : bits % 4 == 0 ? launchWith<uint32_t>(params, args, count, stream)
                                                    : launchWith<uint8_t>(params, args, count, stream);
        if (status != 0) return status;
    }
    return 0;
}

}  // namespace chunkkv
