// Where a token's bytes and a row's entries lie: the only place that computes their offsets. Host and device, 64-bit.
#pragma once

#include "chunkkv/budget.h"

namespace chunkkv {

/// One head of one row of K or V: at(token) is the first byte of its D elements. Token numbers, row starts and entries
/// of the block table are clamped: a wrong value gives the address of a wrong token, never one outside the tensor.
struct TokenRows {
    char* base;
    const int32_t* offsets;  // the row's block table, or null
    int64_t first;           // packed: first token of the row
    int64_t stride_token;
    int64_t stride_block;
    int64_t extent;
    int32_t block_shift;
    int32_t max_blocks;

    CHUNKKV_HD char* at(int32_t token) const {
        if (offsets == nullptr) return base + clampTo(first + token, 0, extent - 1) * stride_token;
        return block(token >> block_shift) + (token & ((1 << block_shift) - 1)) * stride_token;
    }

    /// at(token) for a write: null where the token's block lies outside the pool, such as one with the flag of
    /// TensorRT-LLM's secondary pool (bit 31). A read counts such a block as block 0, whose bytes belong to others.
    CHUNKKV_HD char* writable(int32_t token) const {
        if (offsets == nullptr) return at(token);
        const int64_t offset = offsetOf(token >> block_shift);
        return offset >= 0 && offset < extent ? at(token) : nullptr;
    }

    /// First byte of a block (paged only).
    CHUNKKV_HD char* block(int32_t number) const { return base + inPool(offsetOf(number)) * stride_block; }

    /// The entry of the block table, as it is.
    CHUNKKV_HD int32_t offsetOf(int32_t number) const { return offsets[clampTo(number, 0, max_blocks - 1)]; }
    CHUNKKV_HD int64_t inPool(int64_t offset) const { return offset >= 0 && offset < extent ? offset : 0; }
};

CHUNKKV_HD int32_t log2Of(int32_t power_of_two) {
    int32_t shift = 0;
    while ((1 << shift) < power_of_two) ++shift;
    return shift;
}

/// The tokens of (row, head) in a tensor that starts at `base`; kv is 0 for K (and for queries), 1 for V.
CHUNKKV_HD TokenRows tokenRows(const Layout& layout, const void* base, int32_t kv, int32_t row, int32_t head) {
    TokenRows rows;
    rows.base = static_cast<char*>(const_cast<void*>(base)) + head * layout.stride_head;
    rows.offsets = nullptr;
    rows.first = 0;
    rows.stride_token = layout.stride_token;
    rows.stride_block = layout.stride_block;
    rows.extent = layout.extent;
    rows.block_shift = 0;
    rows.max_blocks = layout.max_blocks;
    if (layout.block_offsets != nullptr) {
        rows.offsets = layout.block_offsets + (static_cast<int64_t>(row) * 2 + kv) * layout.max_blocks;
        rows.block_shift = log2Of(layout.tokens_per_block);
    } else if (layout.row_starts != nullptr) {
        rows.first = layout.row_starts[row];
    } else {
        rows.base += row * layout.stride_row;
    }
    return rows;
}

/// The number in the tensor of the call's KV head `head`.
CHUNKKV_HD int32_t headNumber(const int32_t* numbers, int32_t head, int32_t all_heads) {
    return numbers ? static_cast<int32_t>(clampTo(numbers[head], 0, all_heads - 1)) : head;
}

/// The entries of one row in an array of many rows: `count` of them, from index `first` on.
struct RowPart {
    int64_t first;
    int32_t count;
};

/// The entries of a row of `length` tokens. In a padded array [B, C, pitch] the row has `pitch` entries for each of
/// the C choices. In a packed array [C, T] it has one per token, of which at most `pitch` are used. The part lies
/// inside the array whatever row_starts holds.
CHUNKKV_HD RowPart rowPart(const Rows& rows, int32_t row, int32_t length, int32_t pitch, int32_t choice = 0,
                           int32_t choices = 1) {
    if (rows.row_starts == nullptr) return {(static_cast<int64_t>(row) * choices + choice) * pitch, pitch};
    const int64_t first = clampTo(rows.row_starts[row], 0, rows.num_tokens);
    const int64_t most = pitch < length ? pitch : length;
    return {choice * rows.num_tokens + first, static_cast<int32_t>(clampTo(rows.num_tokens - first, 0, most))};
}

/// Where a row's part of chunk_starts begins: a row with n chunks has n + 1 entries there, [B, max_chunks + 1] or
/// [T + B].
CHUNKKV_HD int64_t firstChunkStart(const RowPart& chunks, int32_t row) { return chunks.first + row; }

/// The index of the first element of (token, head) in a dense tensor [T, heads, D].
CHUNKKV_HD int64_t firstElement(int64_t token, int32_t heads, int32_t head, int32_t head_dim) {
    return (token * heads + head) * head_dim;
}

/// First byte of the layer at `place` of TensorRT-LLM's pool [blocks, layers, K and V, Hkv, tokens_per_block, D].
/// Offsets count K and V parts of `block_bytes` over all layers, so one base serves K and V.
CHUNKKV_HD const char* poolLayer(const char* pool, int32_t place, int64_t block_bytes) {
    return pool + int64_t{place} * 2 * block_bytes;
}

}  // namespace chunkkv
