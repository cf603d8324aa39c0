// Runs CUDA kernels on the host, one fiber per thread, one block after the other. A fiber runs until a barrier or a
// warp collective; the last one to arrive lets the others go on. See simt.cc for the order in which fibers run.
//
// A launch reports mistakes that a GPU would not: a barrier or collective that threads reach at different places in the
// source, a deadlock, a misaligned access. It then returns 1 and failureText() says what happened and where.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulator {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

/// The thread that runs now.
struct Coordinates {
    dim3 thread_index, block_index, block_size, grid_size;
    int linear;  // number of the thread in its block
};
extern const Coordinates* running;
inline const Coordinates& current() { return *running; }
inline int lane() { return running->linear % 32; }

/// Stop the launch with a message; called on a thread of a kernel. Does not return.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void syncThreads(const char* file, int line);

/// What a collective does with the operands of the lanes in `mask`; returns null, or what is wrong.
using Collective = const char* (*)(void* const* lanes, unsigned mask);

/// Wait for all lanes of `mask` at this place; the last one runs `collective` on everybody's operands.
void meet(unsigned mask, void* operand, const char* file, int line, Collective collective);

/// Shared memory, filled with 0xFF (NaN): of a declaration, told apart by `place`; and of the launch.
void* staticShared(const void* place, size_t bytes);
void* dynamicShared();

/// cp.async: the first `bytes` of 16 come from `from`, the others are zero. `perform` runs when the copy is issued or
/// when it is waited for (see chunkkv_emulator_configure). A copy that is not waited for is never made.
struct Copy {
    void* to;
    const void* from;
    int bytes;
    int group;
};
void issueCopy(const Copy& copy, void (*perform)(const Copy&));
void commitCopies();
void waitCopies(int pending_groups, void (*perform)(const Copy&));

/// Multiprocessors that the next launches are sized for: 2, so that a block of a small test has several tiles to walk
/// over, unless chunkkv_emulator_multiprocessors() has said otherwise.
int multiprocessors();

/// Run body() on every thread of the grid. Returns 0, or 1 with a text in failureText().
int run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);
const char* failureText();
/// Count a copy or clear that a GPU would be given as work of its own; launches count themselves.
void countEnqueued();
/// Count a launch that a GPU may start before the one before it has ended.
void countAhead();

template <class P>
int launch(void (*kernel)(const P), dim3 grid, dim3 block, size_t shared_bytes, const P& params) {
    return run(grid, block, shared_bytes, [&] { kernel(params); });
}

}  // namespace emulator

extern "C" {
/// How the next launches run. order: 0 forward, 1 reverse (blocks as well), 2 random by `seed`, 3 greedy (a warp runs
/// as far ahead as it can). async_early: cp.async writes when it is issued, else when it is waited for.
__attribute__((visibility("default"))) void chunkkv_emulator_configure(int order, unsigned seed, int async_early);
/// How many launches, copies and clears were enqueued in this process so far.
__attribute__((visibility("default"))) long long chunkkv_emulator_enqueued();
/// How many of the launches may start on a GPU before the one before has ended: their cost is hidden behind it.
__attribute__((visibility("default"))) long long chunkkv_emulator_ahead();
/// How many multiprocessors the emulated device has.
__attribute__((visibility("default"))) void chunkkv_emulator_multiprocessors(int count);
}
