// How keys come to shared memory: tile after tile of a (row, KV head), contiguous or from the pages of a pool.
#pragma once

#include "score_keys.cuh"

namespace chunkkv {

/// Copies tiles of one (row, KV head) to shared memory one after the other, as they are stored, upwards or downwards.
/// Bytes behind the row's length are never read: the copies fill with zero there. With kStreams the second-level cache
/// need not keep what is read.
template <class Shape, bool kUpwards, bool kStreams>
class Fetcher {
  public:
    /// The next tile is `first`, and there are `count`.
    __device__ Fetcher(const ScoreArgs& args, const Run& run, char* stages, int32_t first, int32_t count)
        : keys_(tokenRows(args.params.key_layout, args.params.key, 0, args.first_row + run.row,
                          headNumber(args.params.kv_head_numbers, run.kv_head, args.params.all_kv_heads))),
          to_(sharedAddress(stages)),
          tile_(first),
          left_(count) {
        readable_ = run.work.length;
        if constexpr (kSteps) to_ = to_ + ownToken() * Shape::kPitch + ownPiece();
        if (keys_.offsets == nullptr) {
            const int64_t start = clampTo(keys_.first, 0, keys_.extent - 1);
            readable_ = static_cast<int32_t>(clampTo(keys_.extent - start, 0, run.work.length));
            keys_.base += start * keys_.stride_token;
        }
        getReady();
    }

    /// Start to copy the next tile, if there is one, to the stage that begins `stage` bytes behind the first; all warps
    /// of the block take part. The copies of every call are a group.
    __device__ void fetch(int stage) {
        if (plain_ > 0) {
            copyPlain(to_ + stage);
            --plain_;
            from_ += kStep * Shape::kTileTokens * keys_.stride_token;
        } else if (left_ > 0) {
            copyNext(to_ + stage);
        }
        cpAsyncCommit();
    }

  private:
    static constexpr int kStep = kUpwards ? 1 : -1;
    static constexpr int kAll = kWarpTokens * Shape::kPieces;
    static constexpr int kEach = (kAll + Shape::kThreads - 1) / Shape::kThreads;
    /// kLanes threads share a token, 128 bytes of it or all, and take the same pieces of tokens that are kStepTokens
    /// apart. Without kSteps, threads take pieces in the order in which they lie.
    static constexpr int kLanes = Shape::kPieces < 8 ? Shape::kPieces : 8;
    static constexpr bool kSteps = Shape::kPieces % kLanes == 0 && Shape::kThreads % kLanes == 0 &&
                                   Shape::kTileTokens % (Shape::kThreads / kLanes) == 0;
    static constexpr int kStepTokens = Shape::kThreads / kLanes;

    __device__ static int ownToken() { return static_cast<int>(threadIdx.x) / kLanes; }
    __device__ static int ownPiece() { return static_cast<int>(threadIdx.x) % kLanes * 16; }

    /// Whether all tokens of the next tile exist.
    __device__ bool isWhole() const { return (tile_ + 1) * Shape::kTileTokens <= readable_; }

    /// Look up what the next tile needs: of contiguous keys how many tiles can be copied without looking again, of
    /// pages where they lie, so that its copy need not wait for that.
    __device__ void getReady() {
        plain_ = 0;
        if (left_ <= 0) return;
        if (keys_.offsets != nullptr) {
            const int lane = threadIdx.x % 32;
#pragma unroll
            for (int group = 0; group < Shape::kGroups; ++group) {
                const int32_t token = tile_ * Shape::kTileTokens + group * kWarpTokens + lane;
                page_[group] = keys_.offsetOf((token < readable_ ? token : readable_ - 1) >> keys_.block_shift);
            }
        } else if (kSteps && isWhole()) {
            const int32_t whole = kUpwards ? readable_ / Shape::kTileTokens - tile_ : left_;
            plain_ = whole < left_ ? whole : left_;
            from_ = inRow(tile_ * Shape::kTileTokens + ownToken()) + ownPiece();
            tile_ += kStep * plain_;
            left_ -= plain_;
        }
    }

    __device__ void copyPlain(SharedAddress to) const {
        const char* from = from_;
#pragma unroll
        for (int i = 0; i < Shape::kTileTokens / kStepTokens; ++i, from += kStepTokens * keys_.stride_token)
            copyToken<true>(to + i * kStepTokens * Shape::kPitch, from, true);
    }

    __device__ void copyNext(SharedAddress to) {
        const int32_t first = tile_ * Shape::kTileTokens;
        if (keys_.offsets != nullptr)
            isWhole() ? copy<true, true>(first, to) : copy<true, false>(first, to);
        else
            isWhole() ? copy<false, true>(first, to) : copy<false, false>(first, to);
        tile_ += kStep;
        --left_;
        getReady();
    }

    template <bool kPaged, bool kWhole>
    __device__ void copy(int32_t first, SharedAddress to) const {
        if constexpr (kSteps) {
            int64_t own = 0;
#pragma unroll
            for (int i = 0; i < Shape::kTileTokens / kStepTokens; ++i) {
                const int token = ownToken() + i * kStepTokens;
                const int group = kStepTokens <= kWarpTokens ? i * kStepTokens / kWarpTokens : token / kWarpTokens;
                if (kPaged && (kStepTokens >= kWarpTokens || i * kStepTokens % kWarpTokens == 0))
                    own = inPool(first, group);
                const char* from = kPaged ? inPage(own, token) : inRow(first + token);
                copyToken<kWhole>(to + i * kStepTokens * Shape::kPitch, from + ownPiece(),
                                  kWhole || first + token < readable_);
            }
        } else {
#pragma unroll
            for (int group = 0; group < Shape::kGroups; ++group) {
                const int64_t own = kPaged ? inPool(first, group) : 0;
#pragma unroll
                for (int i = 0; i < kEach; ++i) {
                    const int item = static_cast<int>(threadIdx.x) + i * Shape::kThreads;
                    const int number = item / Shape::kPieces;
                    const int token = group * kWarpTokens + number, piece = (item - number * Shape::kPieces) * 16;
                    const char* from = kPaged ? inPage(own, number) : inRow(first + token);
                    if (kAll % Shape::kThreads != 0 && item >= kAll) continue;
                    copyPiece(to + token * Shape::kPitch + piece, from + piece, kWhole || first + token < readable_);
                }
            }
        }
    }

    __device__ const char* inRow(int32_t token) const {
        return keys_.base + static_cast<int64_t>(token) * keys_.stride_token;
    }

    /// Where the lane's own token of a group is, in bytes behind the base of the pool.
    __device__ int64_t inPool(int32_t first, int group) const {
        const int32_t token = first + group * kWarpTokens + static_cast<int32_t>(threadIdx.x) % 32;
        const auto place = static_cast<uint32_t>(token & ((1 << keys_.block_shift) - 1));
        const auto page = static_cast<uint32_t>(keys_.inPool(group == 0 ? page_[0] : page_[Shape::kGroups - 1]));
        return page * keys_.stride_block + place * keys_.stride_token;
    }

    /// The address of a token of the group that `own` is of; all lanes ask together.
    __device__ const char* inPage(int64_t own, int token) const {
        return keys_.base + __shfl_sync(kFullWarp, own, token % kWarpTokens);
    }

    /// A thread's pieces of a token.
    template <bool kWhole>
    __device__ static void copyToken(SharedAddress to, const char* from, bool exists) {
#pragma unroll
        for (int i = 0; i < Shape::kPieces / kLanes; ++i)
            copyPiece(to + i * kLanes * 16, from + i * kLanes * 16, kWhole || exists);
    }

    __device__ static void copyPiece(SharedAddress to, const char* from, bool exists) {
        if constexpr (kStreams)
            cpAsync16(to, from, exists ? 16 : 0, evictFirst());
        else
            cpAsync16(to, from, exists ? 16 : 0);
    }

    TokenRows keys_;
    SharedAddress to_;            // the thread's own place in the first stage
    int32_t tile_;                // the next one behind the plain ones
    int32_t left_;                // tiles behind the plain ones
    int32_t plain_ = 0;           // tiles of contiguous keys that come next, all of whose tokens exist
    const char* from_ = nullptr;  // the thread's first piece of the next plain tile
    int32_t readable_;            // tokens that the row has, and the tensor as well
    int32_t page_[Shape::kGroups];
};

}  // namespace chunkkv
