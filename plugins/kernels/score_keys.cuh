// Keys of the score kernels: how a tile of them lies in shared memory, as it is stored, and how a warp multiplies it
// with its query rows, which it holds in registers. score_fetch.cuh brings it there.
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
    static constexpr int kGroupBytes = kWarpTokens * kPitch;
    /// Groups of keys in a tile: a warp multiplies all of them, or two warps that share query rows one each.
    static constexpr int kGroups = kStages * 2 * kGroupBytes <= 99 * 1024 ? 2 : 1;
    static constexpr int kTileTokens = kGroups * kWarpTokens;
    static constexpr int kStageBytes = kGroups * kGroupBytes;
    static constexpr int kColumnTiles = kWarpTokens / 8;
    static_assert(kStages * kStageBytes <= 99 * 1024, "what a block may have on every architecture");
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
    SharedAddress own;          // what the lane passes to ldmatrix, of the warp's first group in the first stage

    /// Lanes 8i.. address matrix i: of two neighbouring column tiles the lower and the upper 8 elements of a step; of
    /// 8-bit keys the 16 bytes of a step in column tile i, of which a thread gets 4.
    __device__ Multiplier(const char* stages, const FragmentPlace& place) {
        const int lane = threadIdx.x % 32;
        own = sharedAddress(stages) + place.group * Shape::kGroupBytes +
              (Shape::kIsByte ? lane * Shape::kPitch
                              : (lane / 16 * 8 + lane % 8) * Shape::kPitch + lane / 8 % 2 * 16);
    }

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

    /// The products with the group of keys that lies `at` bytes behind the warp's first one in the first stage.
    __device__ void multiply(Sums& sums, int at, const FragmentPlace&) const {
        if constexpr (Shape::kIsByte)
            multiplyBytes(sums, own + at);
        else
            multiplyHalves(sums, own + at);
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

    template <int kStep = 0>
    __device__ void multiplyHalves(Sums& sums, SharedAddress keys) const {
#pragma unroll
        for (int pair = 0; pair < Shape::kColumnTiles / 2; ++pair) {
            uint32_t key[4];
            ldmatrixX4(key, keys + pair * 16 * Shape::kPitch + kStep * 32);
            add<kStep>(sums, 2 * pair, key[0], key[1]);
            add<kStep>(sums, 2 * pair + 1, key[2], key[3]);
        }
        if constexpr (kStep + 1 < kSteps) multiplyHalves<kStep + 1>(sums, keys);
    }

    template <int kStep = 0>
    __device__ void multiplyBytes(Sums& sums, SharedAddress keys) const {
        uint32_t fours[4];
        ldmatrixX4(fours, keys + kStep * 16);
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
    const char* own;  // the warp's first group in the first stage

    __device__ Multiplier(const char* stages, const FragmentPlace& place)
        : own(stages + place.group * Shape::kGroupBytes) {}

    __device__ void load(const char* const (&rows)[Shape::kRows], const FragmentPlace&) {
#pragma unroll
        for (int i = 0; i < Shape::kRows; ++i) query[i] = reinterpret_cast<const float*>(rows[i]);
    }

    __device__ void multiply(Sums& sums, int at_group, const FragmentPlace& place) const {
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
                    const auto* key = reinterpret_cast<const Key*>(own + at_group + row * Shape::kPitch);
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

}  // namespace chunkkv
