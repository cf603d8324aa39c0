// One stack and the switch to and from it, told to AddressSanitizer and ThreadSanitizer where they run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <sys/mman.h>

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_OWN_SWITCH
#else
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(EMULATOR_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* object);
void __tsan_release(void* object);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace emulator {

/// Happens-before for ThreadSanitizer: what was done before release() is visible after acquire().
struct SyncPoint {
    char unused = 0;
#if defined(EMULATOR_TSAN)
    void acquire() { __tsan_acquire(&unused); }
    void release() { __tsan_release(&unused); }
#else
    void acquire() {}
    void release() {}
#endif
};

/// While an object of this type lives, ThreadSanitizer ignores the accesses: they are the emulator's own.
struct Unwatched {
#if defined(EMULATOR_TSAN)
    Unwatched() {
        AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
        AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    }
    ~Unwatched() {
        AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
        AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    }
#else
    Unwatched() {}
    ~Unwatched() {}
#endif
};

#if defined(__SANITIZE_ADDRESS__) || defined(EMULATOR_TSAN)
constexpr size_t kStackBytes = 512 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif
constexpr size_t kGuardBytes = 4096;
constexpr size_t kEntryBytes = 4096;  // far more than the frame of a context's entry()

#if defined(EMULATOR_OWN_SWITCH)
using Place = void*;
/// Save the callee-saved registers and the stack pointer to *save, continue at `load`.
extern "C" void emulator_switch(Place* save, Place load);
inline void switchPlace(Place* save, Place* load) { emulator_switch(save, *load); }
#else
using Place = ucontext_t;
inline void switchPlace(Place* save, Place* load) { swapcontext(save, load); }
#endif

/// A stack that runs entry() from its top; the side that switches to it is the scheduler.
class Context {
  public:
    Context() {
        memory_ = static_cast<char*>(mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (memory_ == MAP_FAILED) throw std::bad_alloc();
        mprotect(memory_, kGuardBytes, PROT_NONE);
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(stack(), kStackBytes);
#endif
#if defined(EMULATOR_TSAN)
        tsan_ = __tsan_create_fiber(0);
#endif
    }
    Context(const Context&) = delete;
    Context& operator=(const Context&) = delete;

    /// Forget what ran here; the next enter() calls entry(). `abandoned`: what ran here has not come to its end.
    void reset(void (*entry)(), [[maybe_unused]] bool abandoned) {
#if defined(__SANITIZE_ADDRESS__)
        // A function that has returned leaves nothing poisoned. Only entry() never returns, and what was abandoned.
        const size_t bytes = abandoned ? kStackBytes : kEntryBytes;
        __asan_unpoison_memory_region(stack() + kStackBytes - bytes, bytes);
        asan_fake_ = nullptr;
#endif
#if defined(EMULATOR_OWN_SWITCH)
        auto* top = reinterpret_cast<void**>(stack() + kStackBytes);
        *--top = nullptr;  // as if entry() had been called: 16-byte aligned plus 8
        *--top = reinterpret_cast<void*>(entry);
        for (int i = 0; i < 6; ++i) *--top = nullptr;
        place_ = top;
#else
        getcontext(&place_);
        place_.uc_stack.ss_sp = stack();
        place_.uc_stack.ss_size = kStackBytes;
        place_.uc_link = nullptr;
        makecontext(&place_, entry, 0);
#endif
    }

    /// Run this context until it leaves.
    void enter() {
#if defined(__SANITIZE_ADDRESS__)
        void* fake = nullptr;
        __sanitizer_start_switch_fiber(&fake, stack(), kStackBytes);
#endif
#if defined(EMULATOR_TSAN)
        scheduler_tsan_ = __tsan_get_current_fiber();
        __tsan_switch_to_fiber(tsan_, 1);  // 1: the switch itself orders nothing
#endif
        switchPlace(&scheduler_, &place_);
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    }

    /// The first thing that entry() does.
    void arrive() {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(asan_fake_, &scheduler_stack_, &scheduler_bytes_);
#endif
    }

    /// Back to the scheduler; returns when it enters again.
    void leave() {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(&asan_fake_, scheduler_stack_, scheduler_bytes_);
#endif
#if defined(EMULATOR_TSAN)
        __tsan_switch_to_fiber(scheduler_tsan_, 1);
#endif
        switchPlace(&place_, &scheduler_);
        arrive();
    }

  private:
    char* stack() const { return memory_ + kGuardBytes; }

    char* memory_;
    Place place_{};
    Place scheduler_{};
#if defined(__SANITIZE_ADDRESS__)
    void* asan_fake_ = nullptr;
    const void* scheduler_stack_ = nullptr;
    size_t scheduler_bytes_ = 0;
#endif
#if defined(EMULATOR_TSAN)
    void* tsan_;
    void* scheduler_tsan_ = nullptr;
#endif
};

}  // namespace emulator
