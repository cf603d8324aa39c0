// Keys of the score kernels: how a tile of them comes to shared memory as it is stored, and how a warp multiplies it
// with its query rows, which it holds in registers.
//
// 16-bit keys are multiplied as they are. 8-bit keys become float16, exactly, when a fragment of them is loaded. Every
// thread then holds 4 neighbouring bytes of a key where it holds 2 pairs of 16-bit ones, and its queries are loaded in
// the same order: a sum of products does not mind. float32 is multiplied without tensor cores.
#pragma once

#include <type_traits>

#include "score_schedule.cuh"

namespace chunkkv {

struct Int8 {
    uint8_t bits;
};
struct Fp8 {
    uint8_t bits;
};

/// T is the type of the queries, Key that of the keys.
template <class T, class Key, int kHeadDim>
struct TileShape {
    static constexpr bool kIsFloat = std::is_same_v<T, float>;
    static constexpr bool kIsByte = sizeof(Key) == 1;
    /// 16-row fragments of a warp: queries of half types and the sums must fit its registers.
    static constexpr int kRowTiles = kIsFloat || kHeadDim > 128 ? 1 : 2;
    static constexpr int kRows = 2 * kRowTiles;  // query rows of a thread
    static constexpr int kWarpRows = 16 * kRowTiles;
    static constexpr int kWarps = kBandRows / kWarpRows;
    static constexpr int kThreads = 32 * kWarps;
    /// Per multiprocessor; more would spill.
    static constexpr int blocks(Pass pass) {
        return kThreads != 128 ? 1 : kIsByte && kHeadDim == 128 && pass == Pass::kColumns ? 2 : 3;
    }
    static constexpr int kPieces = kHeadDim * static_cast<int>(sizeof(Key)) / 16;
    static constexpr int kPitch = 16 * (kPieces | 1);  // an odd number of 16 bytes: no bank conflicts
    static constexpr int kStages = 3;
    static constexpr int kMostGroups = kStages * 2 * kWarpTokens * kPitch <= 99 * 1024 ? 2 : 1;
    static constexpr int kColumnTiles = kWarpTokens / 8;
    static_assert(kStages * kWarpTokens * kPitch <= 99 * 1024, "what a block may have on every architecture");
    using Product = std::conditional_t<kIsByte && !kIsFloat, __half, T>;
};

/// Position of a thread in the fragments of its warp. It holds rows row and row + 8 of every 16-row fragment, and of
/// every 8 columns the two from `column` on.
struct FragmentPlace {
    int row_warp, group;
    int row = threadIdx.x % 32 / 4;
    int column = threadIdx.x % 4 * 2;

    __device__ explicit FragmentPlace(const ScoreArgs& args) {
        const int warp = static_cast<int>(threadIdx.x) / 32;
        group = warp / args.row_warps;
        row_warp = warp - group * args.row_warps;
    }
};

/// One query row of a thread, of those that one KV head and band of a row have.
struct QueryRow {
    int32_t number;    // of the R rows of the KV head, -1: none
    int32_t head;      // of the query heads of the KV head; 0 where there is none
    int32_t position;  // among the w queries; likewise
};

template <class Shape>
__device__ QueryRow queryRow(const ScoreArgs& args, const FragmentPlace& place, const Run& run, int i) {
    const RowWork& work = run.work;
    const int32_t number = run.band * args.block_rows + place.row_warp * Shape::kWarpRows + place.row + 8 * i;
    const int32_t head = number / work.head_pitch, position = number - head * work.head_pitch;
    if (number < work.query_rows && position < work.window) return {number, head, position};
    return {-1, 0, 0};
}

/// Where the elements of a query row are.
__device__ inline const char* queryData(const ScoreArgs& args, const Run& run, const QueryRow& query) {
    const ScoreParams& params = args.params;
    const int32_t kv_head = headNumber(params.kv_head_numbers, run.kv_head, params.all_kv_heads);
    const int32_t head = kv_head * (params.heads / params.kv_heads) + query.head, window = run.work.window;
    const int32_t unused = params.query_is_window ? params.settings.window - window : run.work.length - window;
    const TokenRows rows = tokenRows(params.query_layout, params.query, 0, args.first_row + run.row, head);
    return rows.at(unused + query.position);
}

template <class Combine>
__device__ float combineQuad(float value, Combine combine) {
    value = combine(value, __shfl_xor_sync(kFullWarp, value, 1));
    return combine(value, __shfl_xor_sync(kFullWarp, value, 2));
}

struct Larger {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

/// S = Q K^T of a warp's rows and 32 keys, on tensor cores.
template <class T, class Key, int kHeadDim>
struct Multiplier {
    using Shape = TileShape<T, Key, kHeadDim>;
    using Product = typename Shape::Product;
    using Sums = float[Shape::kRowTiles][Shape::kColumnTiles][4];
    static constexpr int kSteps = kHeadDim / 16;
    uint32_t query[Shape::kRowTiles][kSteps][4];
    float scale[Shape::kRows];  // what products are multiplied by; only where rows have been scaled

    __device__ void load(const char* const (&rows)[Shape::kRows], const FragmentPlace& place) {
#pragma unroll
        for (int fragment = 0; fragment < Shape::kRowTiles; ++fragment)
#pragma unroll
            for (int step = 0; step < kSteps; ++step)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int32_t at = step * 16 + (Shape::kIsByte ? 2 * place.column + i / 2 * 2  // 4 in a row
                                                                   : i / 2 * 8 + place.column);
                    const char* from = rows[2 * fragment + i % 2] + at * static_cast<int>(sizeof(T));
                    query[fragment][step][i] = *reinterpret_cast<const uint32_t*>(from);
                }
        if constexpr (kScalesRows) {
#pragma unroll
            for (int row = 0; row < Shape::kRows; ++row) scaleRow(row);
        }
    }

    /// bfloat16 queries of 8-bit keys become float16. A power of two brings the row's largest element to at most 2^15;
    /// what is lost of elements 2^29 times smaller is below the rounding of the sum.
    static constexpr bool kScalesRows = !std::is_same_v<Product, T>;

    __device__ static float lowOf(uint32_t pair) { return __uint_as_float(pair << 16); }
    __device__ static float highOf(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }

    __device__ void scaleRow(int row) {
        float largest = 0.0f;
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint32_t pair = query[row / 2][step][row % 2 + 2 * half];
                largest = fmaxf(largest, fmaxf(fabsf(lowOf(pair)), fabsf(highOf(pair))));
            }
        largest = combineQuad(largest, Larger());
        const uint32_t exponent = __float_as_uint(largest) >> 23;
        const uint32_t used = exponent < 30 ? 30 : exponent > 240 ? 240 : exponent;
        const float by = __uint_as_float((127 + 14 + 127 - used) << 23);
        scale[row] = __uint_as_float((used - 14) << 23);
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint32_t& pair = query[row / 2][step][row % 2 + 2 * half];
                pair = packPair<__half>(lowOf(pair) * by, highOf(pair) * by);
            }
    }

    __device__ void multiply(Sums& sums, const char* keys, const FragmentPlace&) const {
        if constexpr (Shape::kIsByte)
            multiplyBytes(sums, keys);
        else
            multiplyHalves(sums, keys);
    }

  private:
    template <int kStep>
    __device__ void add(Sums& sums, int column_tile, uint32_t low, uint32_t high) const {
#pragma unroll
        for (int fragment = 0; fragment < Shape::kRowTiles; ++fragment) {
            if constexpr (kStep == 0)
                mma16816First<Product>(sums[fragment][column_tile], query[fragment][0], low, high);
            else
                mma16816<Product>(sums[fragment][column_tile], query[fragment][kStep], low, high);
        }
    }

    /// Lanes 8i.. address matrix i: of two neighbouring column tiles the lower and the upper 8 elements of a step.
    template <int kStep = 0>
    __device__ void multiplyHalves(Sums& sums, const char* keys) const {
        const int lane = threadIdx.x % 32;
        const char* address = keys + (lane / 16 * 8 + lane % 8) * Shape::kPitch + lane / 8 % 2 * 16;
#pragma unroll
        for (int pair = 0; pair < Shape::kColumnTiles / 2; ++pair) {
            uint32_t key[4];
            ldmatrixX4(key, address + pair * 16 * Shape::kPitch + kStep * 32);
            add<kStep>(sums, 2 * pair, key[0], key[1]);
            add<kStep>(sums, 2 * pair + 1, key[2], key[3]);
        }
        if constexpr (kStep + 1 < kSteps) multiplyHalves<kStep + 1>(sums, keys);
    }

    /// Lanes 8i.. address the 16 bytes of a step in column tile i; a thread gets 4 bytes of each.
    template <int kStep = 0>
    __device__ void multiplyBytes(Sums& sums, const char* keys) const {
        const int lane = threadIdx.x % 32;
        uint32_t fours[4];
        ldmatrixX4(fours, keys + lane * Shape::kPitch + kStep * 16);
#pragma unroll
        for (int column_tile = 0; column_tile < Shape::kColumnTiles; ++column_tile) {
            uint32_t key[2];
            if constexpr (std::is_same_v<Key, Int8>)
                int8ToHalves(fours[column_tile], key);
            else
                e4m3ToHalves(fours[column_tile], key);
            add<kStep>(sums, column_tile, key[0], key[1]);
        }
        if constexpr (kStep + 1 < kSteps) multiplyBytes<kStep + 1>(sums, keys);
    }
};

__device__ inline float keyValue(const float* keys, int at) { return keys[at]; }
__device__ inline float keyValue(const Int8* keys, int at) { return int8ToFloat(keys[at].bits); }
__device__ inline float keyValue(const Fp8* keys, int at) { return e4m3ToFloat(keys[at].bits); }

/// The same in float32, without tensor cores: Q is read through the first-level cache. Every sum ends in the same
/// thread as above.
template <class Key, int kHeadDim>
struct Multiplier<float, Key, kHeadDim> {
    using Shape = TileShape<float, Key, kHeadDim>;
    using Sums = float[Shape::kRowTiles][Shape::kColumnTiles][4];
    static constexpr bool kScalesRows = false;
    const float* query[Shape::kRows];
    float scale[Shape::kRows];

    __device__ void load(const char* const (&rows)[Shape::kRows], const FragmentPlace&) {
#pragma unroll
        for (int i = 0; i < Shape::kRows; ++i) query[i] = reinterpret_cast<const float*>(rows[i]);
    }

    __device__ void multiply(Sums& sums, const char* keys, const FragmentPlace& place) const {
        constexpr int kStep = 4, kBlock = 16;  // sums of 16 products first: long running sums would lose bits
        constexpr int kTokens = 2 * Shape::kColumnTiles;
#pragma unroll
        for (int token = 0; token < kTokens; ++token)
#pragma unroll
            for (int i = 0; i < Shape::kRows; ++i) sums[i / 2][token / 2][i % 2 * 2 + token % 2] = 0.0f;
#pragma unroll 1
        for (int block = 0; block < kHeadDim; block += kBlock) {
            float part[Shape::kRows][kTokens] = {};
#pragma unroll 1
            for (int at = block; at < block + kBlock; at += kStep) {
                float q[Shape::kRows][kStep];
#pragma unroll
                for (int i = 0; i < Shape::kRows * kStep; ++i)
                    q[i / kStep][i % kStep] = query[i / kStep][at + i % kStep];
#pragma unroll
                for (int token = 0; token < kTokens; ++token) {
                    const int row = token / 2 * 8 + place.column + token % 2;
                    const auto* key = reinterpret_cast<const Key*>(keys + row * Shape::kPitch);
                    float k[kStep];
#pragma unroll
                    for (int j = 0; j < kStep; ++j) k[j] = keyValue(key, at + j);
#pragma unroll
                    for (int i = 0; i < Shape::kRows; ++i)
                        part[i][token] += (q[i][0] * k[0] + q[i][1] * k[1]) + (q[i][2] * k[2] + q[i][3] * k[3]);
                }
            }
#pragma unroll
            for (int token = 0; token < kTokens; ++token)
#pragma unroll
                for (int i = 0; i < Shape::kRows; ++i)
                    sums[i / 2][token / 2][i % 2 * 2 + token % 2] += part[i][token];
        }
    }
};

/// Copies tiles of one (row, KV head) to shared memory, as they are stored. Bytes behind the row's length are never
/// read: the copies fill with zero there. With kStreams the second-level cache need not keep what is read.
template <class Shape, bool kStreams>
class Fetcher {
  public:
    __device__ Fetcher(const ScoreArgs& args, const Run& run)
        : keys_(tokenRows(args.params.key_layout, args.params.key, 0, args.first_row + run.row,
                          headNumber(args.params.kv_head_numbers, run.kv_head, args.params.all_kv_heads))),
          groups_(args.token_groups) {
        readable_ = run.work.length;
        if (keys_.offsets != nullptr) return;
        const int64_t first = clampTo(keys_.first, 0, keys_.extent - 1);
        readable_ = static_cast<int32_t>(clampTo(keys_.extent - first, 0, run.work.length));
        keys_.base += first * keys_.stride_token;
        if constexpr (kSteps) keys_.base += ownToken() * keys_.stride_token + ownPiece();
    }

    /// Look up the pages of a tile, so that fetch() of that tile need not wait for them.
    __device__ void lookAhead(int32_t tile) {
        if (keys_.offsets == nullptr) return;
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int group = 0; group < Shape::kMostGroups; ++group) {
            if (group < groups_) {
                const int32_t token = (tile * groups_ + group) * kWarpTokens + lane;
                page_[group] = keys_.offsetOf((token < readable_ ? token : readable_ - 1) >> keys_.block_shift);
            }
        }
    }

    /// Start to copy the tile that lookAhead() was last called for; all warps of the block take part.
    __device__ void fetch(int32_t tile, char* stage) const {
        const int32_t first = tile * groups_ * kWarpTokens;
        if (first + groups_ * kWarpTokens <= readable_)
            copy<true>(first, stage);
        else
            copy<false>(first, stage);
    }

  private:
    static constexpr int kAll = kWarpTokens * Shape::kPieces;
    static constexpr int kEach = (kAll + Shape::kThreads - 1) / Shape::kThreads;
    /// Whether a thread copies the same piece of tokens that are kStepTokens apart.
    static constexpr bool kSteps = Shape::kThreads % Shape::kPieces == 0;
    static constexpr int kStepTokens = Shape::kThreads / Shape::kPieces;

    __device__ static int ownToken() { return static_cast<int>(threadIdx.x) / Shape::kPieces; }
    __device__ static int ownPiece() { return static_cast<int>(threadIdx.x) % Shape::kPieces * 16; }

    template <bool kWhole>
    __device__ void copy(int32_t first, char* stage) const {
        if constexpr (kSteps)
            if (keys_.offsets == nullptr) return copyInSteps<kWhole>(first, stage);
#pragma unroll
        for (int group = 0; group < Shape::kMostGroups; ++group) {
            if (group >= groups_) continue;
            const int32_t token = first + group * kWarpTokens;
            char* to = stage + group * kWarpTokens * Shape::kPitch;
            if (keys_.offsets == nullptr)
                copyGroup<kWhole>(token, to, [&](int own) {
                    return keys_.base + static_cast<int64_t>(token + own) * keys_.stride_token;
                });
            else
                copyGroup<kWhole>(token, to, [&](int own) {
                    const int64_t page = keys_.inPool(__shfl_sync(kFullWarp, page_[group], own));
                    const int32_t place = (token + own) & ((1 << keys_.block_shift) - 1);
                    return keys_.base + page * keys_.stride_block + place * keys_.stride_token;
                });
        }
    }

    /// Tokens at one distance, from the thread's own of the tile on.
    template <bool kWhole>
    __device__ void copyInSteps(int32_t first, char* stage) const {
        const char* from = keys_.base + first * keys_.stride_token;
        char* to = stage + ownToken() * Shape::kPitch + ownPiece();
        const int64_t step = kStepTokens * keys_.stride_token;
#pragma unroll
        for (int i = 0; i < Shape::kMostGroups * kEach; ++i, from += step) {
            if (i >= kEach && groups_ == 1) break;
            copyPiece(to + i * kStepTokens * Shape::kPitch, from,
                      kWhole || first + ownToken() + i * kStepTokens < readable_);
        }
    }

    /// 32 tokens; addressOf(i) is the first byte of the i-th, which all lanes ask for together.
    template <bool kWhole, class AddressOf>
    __device__ void copyGroup(int32_t first, char* to, AddressOf addressOf) const {
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int item = static_cast<int>(threadIdx.x) + i * Shape::kThreads;
            const int token = item / Shape::kPieces, piece = (item - token * Shape::kPieces) * 16;
            const char* from = addressOf(token < kWarpTokens ? token : 0) + piece;
            if (kAll % Shape::kThreads != 0 && item >= kAll) continue;
            copyPiece(to + token * Shape::kPitch + piece, from, kWhole || first + token < readable_);
        }
    }

    __device__ static void copyPiece(char* to, const char* from, bool exists) {
        if constexpr (kStreams)
            cpAsync16(to, from, exists ? 16 : 0, evictFirst());
        else
            cpAsync16(to, from, exists ? 16 : 0);
    }

    TokenRows keys_;
    int32_t groups_;
    int32_t readable_;  // tokens that the row has, and the tensor as well
    int32_t page_[Shape::kMostGroups];
};

}  // namespace chunkkv
