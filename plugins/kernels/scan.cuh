// Prefix scans over a thread block, in a fixed order: the same inputs give the same bits.
#pragma once

#include "dev.h"

namespace chunkkv {

using ScanWord = unsigned long long;

struct Sum {
    __device__ ScanWord operator()(ScanWord a, ScanWord b) const { return a + b; }
};
struct Max {
    __device__ ScanWord operator()(ScanWord a, ScanWord b) const { return a > b ? a : b; }
};

/// Two counts below 2^32 as one word: Sum adds both at once.
__device__ inline ScanWord packed(int32_t high, int32_t low) {
    return (static_cast<ScanWord>(static_cast<uint32_t>(high)) << 32) | static_cast<uint32_t>(low);
}
__device__ inline int32_t highOf(ScanWord word) { return static_cast<int32_t>(word >> 32); }
__device__ inline int32_t lowOf(ScanWord word) { return static_cast<int32_t>(word & 0xFFFFFFFFu); }

/// Combine the values of all lower threads (0 for thread 0), and of all threads into `total`. All kThreads threads
/// call it; `warp_totals` [kThreads / 32] is shared scratch that callers may hand to one scan after the other.
template <int kThreads, class Combine>
__device__ ScanWord exclusiveScan(ScanWord value, ScanWord* warp_totals, ScanWord& total, Combine combine) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    ScanWord inclusive = value;
    for (int distance = 1; distance < 32; distance *= 2) {
        const ScanWord lower = __shfl_up_sync(kFullWarp, inclusive, distance);
        if (lane >= distance) inclusive = combine(lower, inclusive);
    }
    const ScanWord below = __shfl_up_sync(kFullWarp, inclusive, 1);
    __syncthreads();  // all threads have read the totals of the previous scan
    if (lane == 31) warp_totals[warp] = inclusive;
    __syncthreads();
    ScanWord before = 0;
    total = 0;
    for (int other = 0; other < kThreads / 32; ++other) {
        if (other == warp) before = total;
        total = combine(total, warp_totals[other]);
    }
    return lane == 0 ? before : combine(before, below);
}

}  // namespace chunkkv
