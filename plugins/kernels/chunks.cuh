// The chunks of one row, fixed or by delimiter: the one place that turns a chunk's number into its tokens.
#pragma once

#include "chunkkv/layout.h"
#include "dev.h"

namespace chunkkv {

/// Chunk i of a row spans [start(i), start(i) + length(i)), for i in [0, count). Whatever the table of a delimiter row
/// holds, every span lies in [s, L-W) and has at most c tokens.
struct ChunkSpans {
    const int32_t* starts;  // null for fixed chunks
    int32_t count;
    int32_t first;  // s
    int32_t end;    // L - W
    int32_t size;   // c

    __device__ int32_t start(int32_t chunk) const {
        return starts ? static_cast<int32_t>(clampTo(starts[chunk], first, end)) : first + chunk * size;
    }
    __device__ int32_t length(int32_t chunk) const {
        const int32_t behind = starts ? starts[chunk + 1] : first + (chunk + 1) * size;
        return static_cast<int32_t>(clampTo(static_cast<int64_t>(behind < end ? behind : end) - start(chunk), 0, size));
    }

    /// The first chunk that starts at `token` or behind it, or count: starts ascend.
    __device__ int32_t firstFrom(int32_t token) const {
        int32_t low = 0, behind = count;
        while (low < behind) {
            const int32_t middle = low + (behind - low) / 2;
            if (start(middle) < token)
                low = middle + 1;
            else
                behind = middle;
        }
        return low;
    }
};

/// `part` is the row's part of a table with one entry per chunk; `starts` and `num_chunks` [B] are null for fixed
/// chunks.
__device__ inline ChunkSpans chunkSpans(const Settings& settings, const int32_t* starts, const int32_t* num_chunks,
                                        const RowPart& part, int32_t row, int32_t length) {
    ChunkSpans spans;
    spans.starts = starts ? starts + firstChunkStart(part, row) : nullptr;
    spans.first = settings.sinks;
    spans.end = length - settings.window;
    spans.size = settings.chunk_size;
    const int64_t most = clampTo(maxChunks(settings, length), 0, part.count);
    spans.count = static_cast<int32_t>(starts ? clampTo(num_chunks[row], 0, most) : most);
    return spans;
}

/// Whether a token ends a chunk: bit (id % 32) of word (id / 32) of bitmap [ceil(vocab_size / 32)].
__device__ inline bool isDelimiterId(int32_t id, const uint32_t* bitmap, int32_t vocab_size) {
    return id >= 0 && id < vocab_size && (bitmap[id / 32] >> (id % 32) & 1u) != 0;
}

}  // namespace chunkkv
