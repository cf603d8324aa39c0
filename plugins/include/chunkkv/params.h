/* One plain struct per op, shared by the C ABI and the kernels. Valid C; nothing here has a constructor.
 *
 * Letters: B rows of the batch, Hq query heads, Hkv KV heads, D head size, L prompt length of a row, S padded length,
 * W observation window of the engine, w <= W of a row, s sinks, c chunk size, N kept tokens of a row, T entries of a
 * packed array.
 *
 * How per-row values arrive. The host knows B, S and the settings; everything that differs between rows lies in
 * device arrays that only kernels read: lengths [B] and, optionally, keep_per_10k, budget_tokens, windows [B]. Kernels
 * clamp lengths to [0, S]; budget.h turns a row's values into N(L). A row with N == L is kept whole: score skips it,
 * so its scores are undefined, and select does not read them.
 *
 * How the ops hand over. score ends in chunk_scores [B, C, max_chunks], the mean of a[t] over each chunk's own tokens;
 * select ranks those and writes kept_indices; compact and the caller read kept_indices and kept_lengths.
 *   fixed      chunk i of a row spans [s + i*c, min(s + (i+1)*c, L-W)); there are ceil((L-W-s)/c) of them.
 *   delimiter  the boundaries op writes chunk_starts and num_chunks once per prompt; chunk i spans chunk_starts[i] to
 *              chunk_starts[i+1], and chunk_starts[num_chunks] == L-W. score and select of all layers read the same.
 * max_chunks is the row pitch of chunk_scores; chunkkv_max_chunks() gives the smallest that every row fits in.
 *
 * Padded and packed. Arrays with an entry per token of a row come in two forms, for all arrays of a call alike:
 *                                    padded (rows.row_starts is NULL)      packed (rows.row_starts is given)
 *   token_ids                        [B, S]                                [T], row r from row_starts[r] on, L entries
 *   token_scores, given_scores       [B, C, S]                             [C, T], row r from row_starts[r] on
 *   chunk_scores                     [B, C, max_chunks]                    [C, T], row r from row_starts[r] on
 *   kept_indices                     [B, C, max_kept]                      [C, T], row r from row_starts[r] on
 *   chunk_starts                     [B, max_chunks + 1]                   [T + B], row r from row_starts[r] + r on
 * C counts the choices of a row: 1 where all KV heads of the call keep the same tokens, Hkv where heads is "each".
 * Packed rows lie back to back, and T may exceed their sum: entries after the last row are not used. A row of L tokens
 * has at most L chunks and keeps at most L tokens, so it never needs more than its own entries; max_chunks and max_kept
 * only bound what one row may use of them. Whatever row_starts holds, kernels stay inside [0, T).
 *
 * Pointers are device pointers unless a comment says host. Sizes in [brackets] are row-major and dense. Strides are in
 * bytes. Contents of device arrays may be anything: kernels stay inside the given sizes for every value.
 */
#ifndef CHUNKKV_PARAMS_H
#define CHUNKKV_PARAMS_H

#include <stdint.h>

/* Storage types. int8 and fp8 (e4m3) are for KV caches: compact moves their bytes, score multiplies by key_scale. */
enum { CHUNKKV_FLOAT32 = 0, CHUNKKV_FLOAT16 = 1, CHUNKKV_BFLOAT16 = 2, CHUNKKV_INT8 = 3, CHUNKKV_FP8_E4M3 = 4 };
enum { CHUNKKV_BOUNDARIES_FIXED = 0, CHUNKKV_BOUNDARIES_DELIMITER = 1 };
enum { CHUNKKV_SCORE_SOFTMAX = 0, CHUNKKV_SCORE_LOGITS = 1, CHUNKKV_SCORE_GIVEN = 2 };
enum { CHUNKKV_REDUCE_MEAN = 0, CHUNKKV_REDUCE_MAX = 1 };
enum { CHUNKKV_HEADS_SHARED = 0, CHUNKKV_HEADS_EACH = 1 };
enum { CHUNKKV_SPLIT_UNIFORM = 0, CHUNKKV_SPLIT_CLASSES = 1 };
enum { CHUNKKV_CLASS_READING = 0, CHUNKKV_CLASS_LOCAL = 1 };
enum { CHUNKKV_POLICY_CHUNKS = 0, CHUNKKV_POLICY_RECENT = 1 };
enum { CHUNKKV_ROPE_NEOX = 0, CHUNKKV_ROPE_GPTJ = 1 };
/* 65535 is the largest y or z size of a CUDA grid. */
enum { CHUNKKV_MAX_LENGTH = 1 << 22, CHUNKKV_MAX_BATCH = 65535, CHUNKKV_MAX_HEADS = 65535, CHUNKKV_MAX_LAYERS = 64 };

/* What the engine was built with. limits.h has the range of every setting. */
typedef struct chunkkv_settings {
    int32_t window;        /* W; a row may use fewer of its queries, see rows.windows */
    int32_t sinks;         /* s */
    int32_t chunk_size;    /* c */
    int32_t boundaries;    /* CHUNKKV_BOUNDARIES_* */
    int32_t pooling;       /* odd; 1 = off */
    int32_t score;         /* CHUNKKV_SCORE_* */
    int32_t window_reduce; /* CHUNKKV_REDUCE_*: over the queries of the window; mean unless score is softmax */
    int32_t head_reduce;   /* CHUNKKV_REDUCE_*: over the query heads of a choice; likewise */
    int32_t value_norm;    /* 1: a head's score times the length of the token's value vector; 0 likewise */
    int32_t heads;         /* CHUNKKV_HEADS_*: whether KV heads keep the same tokens or each its own */
    int32_t keep_per_10k;  /* ratio mode, where budget_tokens is 0 */
    int32_t budget_tokens; /* above 0: budget mode */
    int32_t min_tokens;    /* m >= W + s + c */
    int32_t budget_split;  /* CHUNKKV_SPLIT_*; the members below are 0 where it is uniform */
    int32_t head_class;    /* CHUNKKV_CLASS_*: whose N and policy a call is about */
    int32_t local_policy;  /* CHUNKKV_POLICY_*: recent keeps sinks and the last N - s tokens, by no score */
    int32_t all_heads;     /* KV heads of all layers of the model */
    int32_t all_reading_heads;     /* those of them that are of the class reading */
    int32_t reading_share_per_10k; /* what a reading head keeps, relative to the request's keep */
    int32_t reserved;              /* 0 */
} chunkkv_settings;

/* The rows of a batch. */
typedef struct chunkkv_rows {
    const int32_t* lengths;       /* [B] L of each row */
    const int32_t* keep_per_10k;  /* [B] or NULL: settings.keep_per_10k */
    const int32_t* budget_tokens; /* [B], 0 = ratio mode, or NULL: 0 where keep_per_10k is given, else the settings' */
    const int32_t* row_starts;    /* [B] first entry of each row in packed arrays, or NULL: padded arrays */
    const int32_t* windows;       /* [B] w of each row, clamped to [1, W], or NULL: W */
    int64_t num_tokens;           /* T, 1..INT32_MAX; not read where row_starts is NULL */
    int32_t batch;                /* B, 0..CHUNKKV_MAX_BATCH */
    int32_t max_length;           /* S, 0..CHUNKKV_MAX_LENGTH */
} chunkkv_rows;

/* Where the D elements of (row, head, token) lie; D elements are always adjacent. One of three:
 *   contiguous  base + row*stride_row + head*stride_head + token*stride_token
 *   packed      base + (row_starts[row] + token)*stride_token + head*stride_head      (rows back to back, e.g. QKV)
 *   paged       TensorRT-LLM's pool: base + offset*stride_block + head*stride_head + (token % tokens_per_block)*
 *               stride_token, offset = block_offsets[row][0 for K, 1 for V][token / tokens_per_block]; base is the
 *               layer's first byte in the primary pool, heads inside a block are [Hkv, tokens_per_block, D]. */
typedef struct chunkkv_layout {
    const int32_t* block_offsets; /* [B, 2, max_blocks]; NULL unless paged */
    const int32_t* row_starts;    /* [B] first token of each row; NULL unless packed */
    int64_t stride_row;           /* contiguous only */
    int64_t stride_head;
    int64_t stride_token;
    int64_t stride_block;     /* paged only: bytes of one block of K (or of V) of one layer */
    int64_t extent;           /* contiguous: tokens a row has room for; packed: T; paged: offsets lie in [0, extent),
                               * for TensorRT-LLM's pool (blocks - 1) * layers * 2 + 2; INT64_MAX where its size is
                               * not known (then offsets are trusted) */
    int32_t tokens_per_block; /* paged only: a power of two */
    int32_t max_blocks;       /* paged only */
} chunkkv_layout;

/* boundaries: find the delimiter chunks of every row; once per prompt, for all layers. */
typedef struct chunkkv_boundaries_params {
    chunkkv_settings settings;
    chunkkv_rows rows;
    const int32_t* token_ids;         /* [B, S] or [T]; flags where delimiter_bitmap is NULL */
    const uint32_t* delimiter_bitmap; /* [ceil(vocab_size / 32)] bit (id % 32) of word (id / 32) is set: delimiter;
                                       * NULL with vocab_size 0: token_ids that are not 0 are delimiters */
    int32_t vocab_size;               /* ids outside [0, vocab_size) delimit nothing */
    int32_t max_chunks;               /* at least chunkkv_max_chunks() */
    int32_t* chunk_starts;            /* out [B, max_chunks + 1] or [T + B] */
    int32_t* num_chunks;              /* out [B] */
} chunkkv_boundaries_params;

/* score: window queries against all keys, down to one mean per chunk. query, key, value and all their strides are
 * multiples of 16 bytes. With score = given, chunks are means of given_scores; query, key and value are not read. */
typedef struct chunkkv_score_params {
    chunkkv_settings settings;
    chunkkv_rows rows;
    chunkkv_layout query_layout; /* never paged */
    chunkkv_layout key_layout;
    chunkkv_layout value_layout;    /* read where value_norm is 1 */
    const void* query;              /* [B, heads, W or L, D] rotated; heads are those of the tensor, see below */
    const void* key;                /* [B, KV heads, L, D] rotated */
    const void* value;              /* [B, KV heads, L, D] of key's type, where value_norm is 1; else NULL */
    const float* key_scale;         /* [1] multiplies int8 and fp8 keys, or NULL: 1 */
    const float* value_scale;       /* [1] multiplies int8 and fp8 values, or NULL: 1 */
    const float* given_scores;      /* [B, C, S] or [C, T] a[t] before pooling where score is given, else NULL */
    const int32_t* kv_head_numbers; /* [Hkv] which KV heads of key and value this call is about, and of query those of
                                     * the same groups; clamped to [0, all_kv_heads); NULL: 0..Hkv-1 */
    const int32_t* chunk_starts;    /* [B, max_chunks + 1] or [T + B] where boundaries is delimiter, else NULL */
    const int32_t* num_chunks;      /* [B] likewise */
    float* chunk_scores;            /* out [B, C, max_chunks] or [C, T]; entries behind a row's chunks are left alone */
    float* token_scores;            /* out [B, C, S] or [C, T] a[t], zero from L-W on and for L < W, or NULL */
    int32_t heads;                  /* Hq of this call */
    int32_t kv_heads;               /* Hkv of this call; Hq / Hkv is a whole number from 1 to 16 */
    int32_t all_kv_heads;           /* KV heads of key; read where kv_head_numbers is given */
    int32_t head_dim;               /* D: 64, 80, 96, 128 or 256 */
    int32_t query_dtype;            /* float32, float16 or bfloat16 */
    int32_t key_dtype;              /* query_dtype, int8 or fp8 */
    int32_t query_is_window;        /* 1: query holds the last W tokens of a row; 0: all of them, the last are used */
    int32_t max_chunks;             /* at least chunkkv_max_chunks() */
} chunkkv_score_params;

/* select: rank the chunks, fill the budget exactly. Needs no workspace. */
typedef struct chunkkv_select_params {
    chunkkv_settings settings;
    chunkkv_rows rows;
    const float* chunk_scores;   /* [B, C, max_chunks] or [C, T]; not read where the policy is recent */
    const int32_t* chunk_starts; /* [B, max_chunks + 1] or [T + B] where boundaries is delimiter, else NULL */
    const int32_t* num_chunks;   /* [B] likewise */
    int32_t* kept_indices;       /* out [B, C, max_kept] or [C, T] ascending; -1 behind N (packed: up to the row's L) */
    int32_t* kept_lengths;       /* out [B] N(L), at most max_kept; the same for all choices of a row */
    int32_t choices;             /* C: 1 where heads is shared, else Hkv */
    int32_t max_chunks;          /* at least chunkkv_max_chunks() */
    int32_t max_kept;            /* at least the largest N; a longer list is cut here */
    int32_t reserved;            /* 0 */
} chunkkv_select_params;

/* The cache of one layer, in `layout` terms the base of K and of V (paged: both the layer's base). */
typedef struct chunkkv_layer {
    const void* key;
    const void* value;
    void* key_out; /* NULL: in place; then value_out is NULL as well, for every layer of the call */
    void* value_out;
} chunkkv_layer;

/* compact: move the kept rows of K and V to slots 0..N-1, bytes unchanged, all given layers in one launch.
 * Out of place, source and destination may not overlap; slots from N on are left alone in both modes.
 * In place, no block may appear in two rows (share no prefix between them); a row whose kept length is L is not
 * touched, nor are slots that already hold their token. What would go to a block outside the pool is not written.
 * Where kept_lengths is NULL (padded and out of place only) every one of the max_kept slots is written and rows.lengths
 * is not read: negative indices repeat the row's first token, so that no slot of the output holds old memory. */
typedef struct chunkkv_compact_params {
    chunkkv_rows rows;           /* the budget arrays are not read */
    chunkkv_layout layout;       /* of key and value */
    chunkkv_layout layout_out;   /* of key_out and value_out; not read in place */
    const int32_t* kept_indices; /* [B, C, max_kept] or [C, T] strictly ascending, in [0, L) */
    const int32_t* kept_lengths; /* [B] N; clamped to [0, min(max_kept, L)]; or NULL */
    const int32_t* kv_head_numbers; /* [Hkv] which heads of the caches are moved, clamped to [0, all_kv_heads); out of
                                     * place they become heads 0..Hkv-1; NULL: 0..Hkv-1 */
    const chunkkv_layer* layers;    /* host [num_layers]; copied before the call returns */
    int32_t num_layers;             /* more than CHUNKKV_MAX_LAYERS take one launch per CHUNKKV_MAX_LAYERS */
    int32_t max_kept;
    int32_t kv_heads;     /* Hkv */
    int32_t all_kv_heads; /* heads of the caches; read where kv_head_numbers is given */
    int32_t choices;      /* C: 1, or Hkv where every head has its own indices */
    int32_t row_bytes;    /* D * bytes of one element */
} chunkkv_compact_params;

/* rope: rotate Q and K of packed QKV by the logical position of each token; V and elements from rotary_dim on are
 * copied. Arithmetic in float32, rounded once. */
typedef struct chunkkv_rope_params {
    const void* qkv;          /* [T, (Hq + 2*Hkv) * D] */
    void* qkv_out;            /* same shape; may be qkv itself, may not overlap it otherwise */
    const int32_t* positions; /* [T] logical positions; clamped to [0, max_positions) */
    const float* cos_sin;     /* [max_positions, rotary_dim / 2, 2] cosine, then sine (TensorRT-LLM's table); aligned
                               * to 8 bytes */
    int64_t num_tokens;       /* T >= 0 */
    int32_t max_positions;
    int32_t heads;      /* Hq */
    int32_t kv_heads;   /* Hkv */
    int32_t head_dim;   /* D */
    int32_t rotary_dim; /* even, 2..D */
    int32_t style;      /* CHUNKKV_ROPE_*: neox pairs (i, i + rotary_dim/2), gptj pairs (2i, 2i + 1) */
    int32_t dtype;      /* float32, float16 or bfloat16 */
    int32_t reserved;   /* 0 */
} chunkkv_rope_params;

/* prepare: everything that a packed batch of context rows (whole prompts), then generation rows (one token each) needs
 * to know per row and per token, once for all layers. L of a row is clamped to [0, max_length]; tokens behind the last
 * row get position 0. */
typedef struct chunkkv_prepare_params {
    chunkkv_settings settings;
    const int32_t* sequence_lengths;  /* [B] logical: what a row has seen, the tokens of this batch included */
    const int32_t* context_lengths;   /* [B] L, the prompt length, of generation rows as well */
    const int32_t* token_ids;         /* [T], or NULL: then delimiter_bitmap and is_delimiter are NULL, vocab_size 0 */
    const uint32_t* delimiter_bitmap; /* [ceil(vocab_size / 32)] as in boundaries */
    int32_t* attention_lengths;       /* out [B] slots that attention reads: context rows sequence_length as it is,
                                       * generation rows sequence_length - (L - N(L)), at least 1 */
    int32_t* kept_lengths;            /* out [B] N(L) */
    int32_t* row_starts;              /* out [B] sum of the tokens of the rows before: L each, 1 of a generation row;
                                       * clamped to [0, T] */
    int32_t* positions;               /* out [T] logical: 0..L-1, of a generation row sequence_length - 1, at least 0 */
    int32_t* is_delimiter;            /* out [T] 1 for delimiters, else 0; or NULL */
    int64_t num_tokens;               /* T, 1..INT32_MAX, where batch is not 0 */
    int32_t batch;                    /* B */
    int32_t contexts;                 /* leading rows in their context phase, 0..B */
    int32_t max_length;               /* 0..CHUNKKV_MAX_LENGTH */
    int32_t vocab_size;               /* ids outside [0, vocab_size) are no delimiters */
} chunkkv_prepare_params;

#ifdef __cplusplus
#include <type_traits>

namespace chunkkv {
using Settings = chunkkv_settings;
using Rows = chunkkv_rows;
using Layout = chunkkv_layout;
using Layer = chunkkv_layer;
using BoundariesParams = chunkkv_boundaries_params;
using ScoreParams = chunkkv_score_params;
using SelectParams = chunkkv_select_params;
using CompactParams = chunkkv_compact_params;
using RopeParams = chunkkv_rope_params;
using PrepareParams = chunkkv_prepare_params;

/* Kernels take these by value: trivially copyable, and without padding that would carry undefined bytes. */
template <class P>
constexpr bool isPlain = std::is_trivially_copyable_v<P> && std::has_unique_object_representations_v<P>;
static_assert(isPlain<Settings> && isPlain<Rows> && isPlain<Layout> && isPlain<Layer>);
static_assert(isPlain<BoundariesParams> && isPlain<ScoreParams> && isPlain<SelectParams>);
static_assert(isPlain<CompactParams> && isPlain<RopeParams> && isPlain<PrepareParams>);
}  // namespace chunkkv
#endif

#endif
