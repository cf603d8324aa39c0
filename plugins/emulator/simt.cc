// The scheduler: blocks one after the other, their threads as fibers in one of four orders.
//
// For ThreadSanitizer this file is compiled without instrumentation, and every CUDA thread is a TSan fiber. Switching
// between fibers implies no order of memory accesses. This file reports what does: barriers, and the end of a launch
// before the next one. Warp collectives exchange values and, as in CUDA, order no other memory: of them only __syncwarp
// would, and no kernel has it. Four sets of fibers take turns, so that neighbouring blocks stay unordered and a race
// between them is found. Sync points alternate in pairs: with a single one, phase n of one thread would be ordered
// before phase n+1 of another.
#include "simt.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "context.h"

#if defined(EMULATOR_OWN_SWITCH)
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, .-emulator_switch
)");
#endif

namespace emulator {

const Coordinates* running = nullptr;

namespace {

enum class State { kReady, kAtBarrier, kInCollective, kDone };
enum Order { kForward, kReverse, kRandom, kGreedy };

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 99 * 1024;  // of the architectures that have least: sm_86, sm_89, sm_120
constexpr int kFiberSets = 4;

struct Fiber {
    Coordinates at;
    Context context;
    State state = State::kDone;
    const char* file = "";  // where it waits
    int line = 0;
    std::vector<Copy> copies;
    int groups = 0;
};

struct Meeting {
    unsigned mask, arrived;
    const char* file;
    int line;
    Collective collective;
    void* operands[32];
};

struct Warp {
    std::vector<Meeting> meetings;  // by mask: disjoint parts of a warp may meet at the same time
};

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
using SharedMemory = std::unique_ptr<void, Free>;

struct Block {
    std::vector<std::unique_ptr<Fiber>> fibers;
    Warp warps[kMaxThreads / 32];
    SyncPoint sync[2];
    int phase = 0;
    unsigned threads = 0, alive = 0, arrived = 0;
    const char* file = "";  // of the barrier that threads wait at
    int line = 0;
    SharedMemory dynamic_memory;
    std::vector<std::pair<const void*, SharedMemory>> static_memory;
};

std::mutex launch_mutex;
int order = kForward;
bool async_early = false;
int multiprocessor_count = 2;
uint32_t random_state = 1;
char failure_text[512] = "";
bool failed = false;
Block sets[kFiberSets];
Block* block = nullptr;
Fiber* fiber = nullptr;
const std::function<void()>* kernel_body = nullptr;
SyncPoint launch_sync[2];
int launch_number = 0;
std::atomic<long long> enqueued{0}, ahead{0};

uint32_t nextRandom() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    random_state ^= random_state << 5;
    return random_state;
}

SharedMemory freshShared(size_t bytes) {
    const Unwatched unwatched;
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, bytes ? bytes : 1) != 0) throw std::bad_alloc();
    for (size_t i = 0; i < bytes; ++i) static_cast<volatile unsigned char*>(memory)[i] = 0xFF;
    return SharedMemory(memory);
}

void wait(State state, const char* file, int line) {
    fiber->state = state;
    fiber->file = file;
    fiber->line = line;
    fiber->context.leave();
}

void openBarrier() {
    for (unsigned i = 0; i < block->threads; ++i)
        if (block->fibers[i]->state == State::kAtBarrier) block->fibers[i]->state = State::kReady;
    block->arrived = 0;
    block->phase ^= 1;
}

void runThread() {
    fiber->context.arrive();
    launch_sync[(launch_number + 1) % 2].acquire();
    (*kernel_body)();
    launch_sync[launch_number % 2].release();
    fiber->state = State::kDone;
    --block->alive;
    if (block->arrived > 0 && block->arrived == block->alive) openBarrier();
    fiber->context.leave();
}

/// The next thread that can run, or -1.
int pick(int last) {
    const int threads = static_cast<int>(block->threads);
    const auto ready = [](int i) { return block->fibers[i]->state == State::kReady; };
    if (order == kGreedy)
        for (int i = last / 32 * 32; i < threads && i < last / 32 * 32 + 32; ++i)
            if (ready(i)) return i;
    const int start = order == kRandom ? static_cast<int>(nextRandom() % block->threads) : last + 1;
    for (int step = 0; step < threads; ++step) {
        const int i = order == kReverse ? (2 * threads + last - 1 - step) % threads : (start + step) % threads;
        if (ready(i)) return i;
    }
    return -1;
}

void describeDeadlock() {
    int used = std::snprintf(failure_text, sizeof(failure_text), "deadlock: %u threads wait", block->alive);
    int shown = 0;
    for (unsigned i = 0; i < block->threads && shown < 4; ++i) {
        const Fiber& one = *block->fibers[i];
        if (one.state == State::kDone) continue;
        used += std::snprintf(failure_text + used, sizeof(failure_text) - used, "; thread %u for a %s at %s:%d", i,
                              one.state == State::kAtBarrier ? "barrier" : "collective", one.file, one.line);
        if (used >= static_cast<int>(sizeof(failure_text))) break;
        ++shown;
    }
    failed = true;
}

void runBlock(dim3 index, dim3 grid, dim3 size, size_t shared_bytes) {
    block->threads = block->alive = size.x * size.y * size.z;
    block->arrived = 0;
    while (block->fibers.size() < block->threads) block->fibers.push_back(std::make_unique<Fiber>());
    for (Warp& warp : block->warps) warp.meetings.clear();
    for (unsigned i = 0; i < block->threads; ++i) {
        Fiber& one = *block->fibers[i];
        one.at = {dim3(i % size.x, i / size.x % size.y, i / size.x / size.y), index, size, grid, static_cast<int>(i)};
        one.context.reset(runThread, one.state != State::kDone);
        one.state = State::kReady;
        one.copies.clear();
        one.groups = 0;
    }
    block->dynamic_memory = freshShared(shared_bytes);
    int last = order == kReverse ? 0 : -1;
    while (block->alive > 0 && !failed) {
        const int next = pick(last < 0 ? static_cast<int>(block->threads) - 1 : last);
        if (next < 0) {
            describeDeadlock();
            break;
        }
        last = next;
        fiber = block->fibers[next].get();
        running = &fiber->at;
        fiber->context.enter();
    }
    const Unwatched unwatched;
    block->dynamic_memory.reset();
    block->static_memory.clear();
}

/// The meeting of these lanes at this place, with the operand of one more of them.
Meeting& join(Warp& warp, unsigned mask, int own, void* operand, const char* file, int line, Collective collective) {
    const Unwatched unwatched;
    size_t at = 0;
    while (at < warp.meetings.size() && warp.meetings[at].mask != mask) ++at;
    if (at == warp.meetings.size()) warp.meetings.push_back({mask, 0, file, line, collective, {}});
    Meeting& meeting = warp.meetings[at];
    meeting.arrived |= 1u << own;
    meeting.operands[own] = operand;
    return meeting;
}

bool refuse(const char* what, size_t value, size_t most) {
    std::snprintf(failure_text, sizeof(failure_text), "%s is %zu; the most is %zu", what, value, most);
    return false;
}

bool launchable(dim3 grid, dim3 size, size_t shared_bytes) {
    if (size.x * size.y * size.z > kMaxThreads)
        return refuse("threads per block", size.x * size.y * size.z, kMaxThreads);
    if (shared_bytes > kMaxSharedBytes) return refuse("dynamic shared memory", shared_bytes, kMaxSharedBytes);
    if (grid.y > 65535 || grid.z > 65535) return refuse("grid y or z", grid.y > grid.z ? grid.y : grid.z, 65535);
    return true;
}

}  // namespace

void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const int used = std::vsnprintf(failure_text, sizeof(failure_text), format, arguments);
    va_end(arguments);
    const Coordinates& at = fiber->at;
    if (used >= 0 && used < static_cast<int>(sizeof(failure_text)))
        std::snprintf(failure_text + used, sizeof(failure_text) - used, " (block %u,%u,%u thread %d)", at.block_index.x,
                      at.block_index.y, at.block_index.z, at.linear);
    failed = true;
    for (;;) fiber->context.leave();
}

void syncThreads(const char* file, int line) {
    if (block->arrived > 0 && (block->file != file || block->line != line))
        fail("threads of a block meet different barriers: %s:%d and %s:%d", block->file, block->line, file, line);
    block->file = file;
    block->line = line;
    SyncPoint& sync = block->sync[block->phase];
    sync.release();
    if (++block->arrived == block->alive)
        openBarrier();
    else
        wait(State::kAtBarrier, file, line);
    sync.acquire();
}

void meet(unsigned mask, void* operand, const char* file, int line, Collective collective) {
    const int own = fiber->at.linear % 32, first = fiber->at.linear - own;
    Warp& warp = block->warps[first / 32];
    if (!(mask >> own & 1)) fail("lane %d calls a collective at %s:%d with mask %08x", own, file, line, mask);
    Meeting& meeting = join(warp, mask, own, operand, file, line, collective);
    if (meeting.file != file || meeting.line != line || meeting.collective != collective)
        fail("lanes of a warp meet different collectives: %s:%d and %s:%d", meeting.file, meeting.line, file, line);
    if (meeting.arrived != mask) return wait(State::kInCollective, file, line);
    const char* wrong = nullptr;
    {
        const Unwatched unwatched;  // the operands lie on the stacks of the lanes
        wrong = collective(meeting.operands, mask);
    }
    if (wrong != nullptr) fail("%s at %s:%d", wrong, file, line);
    for (int i = 0; i < 32; ++i)
        if ((mask >> i & 1) && i != own) block->fibers[first + i]->state = State::kReady;
    const Unwatched unwatched;
    warp.meetings.erase(warp.meetings.begin() + (&meeting - warp.meetings.data()));
}

void* staticShared(const void* place, size_t bytes) {
    for (const auto& [known, memory] : block->static_memory)
        if (known == place) return memory.get();
    block->static_memory.emplace_back(place, freshShared(bytes));
    return block->static_memory.back().second.get();
}

void* dynamicShared() { return block->dynamic_memory.get(); }

void issueCopy(const Copy& copy, void (*perform)(const Copy&)) {
    if (async_early) return perform(copy);
    fiber->copies.push_back(copy);
    fiber->copies.back().group = fiber->groups;
}

void commitCopies() { ++fiber->groups; }

void waitCopies(int pending_groups, void (*perform)(const Copy&)) {
    size_t done = 0;
    for (; done < fiber->copies.size() && fiber->copies[done].group < fiber->groups - pending_groups; ++done)
        perform(fiber->copies[done]);
    fiber->copies.erase(fiber->copies.begin(), fiber->copies.begin() + static_cast<long>(done));
}

int run(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& body) {
    const std::lock_guard<std::mutex> lock(launch_mutex);
    if (!launchable(grid, size, shared_bytes)) return 1;
    failed = false;
    kernel_body = &body;
    countEnqueued();
    ++launch_number;
    launch_sync[(launch_number + 1) % 2].release();
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    for (uint64_t i = 0; i < blocks && !failed; ++i) {
        const uint64_t number = order == kReverse ? blocks - 1 - i : i;
        block = &sets[i % kFiberSets];
        runBlock(dim3(static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                      static_cast<unsigned>(number / grid.x / grid.y)),
                 grid, size, shared_bytes);
    }
    launch_sync[launch_number % 2].acquire();
    running = nullptr;
    return failed ? 1 : 0;
}

const char* failureText() { return failure_text; }

void countEnqueued() { ++enqueued; }

void countAhead() { ++ahead; }

int multiprocessors() { return multiprocessor_count; }

}  // namespace emulator

void chunkkv_emulator_configure(int order, unsigned seed, int async_early) {
    const std::lock_guard<std::mutex> lock(emulator::launch_mutex);
    emulator::order = order;
    emulator::random_state = seed ? seed : 1;
    emulator::async_early = async_early != 0;
}

long long chunkkv_emulator_enqueued() { return emulator::enqueued; }

long long chunkkv_emulator_ahead() { return emulator::ahead; }

void chunkkv_emulator_multiprocessors(int count) {
    const std::lock_guard<std::mutex> lock(emulator::launch_mutex);
    emulator::multiprocessor_count = count > 0 ? count : 1;
}
