// The device vocabulary of plugins/kernels/dev.h for host compilers: the names of CUDA, its 16-bit types, and the
// instructions, on top of the fibers of simt.h. Conversions round as the hardware does; mma rounds once per
// instruction, to float32. Not modelled: the error of ex2.approx, rounding inside tensor cores, weak memory order.
#pragma once

#include <cmath>
#include <cstring>

#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __restrict__

#define SHARED(T, name, n)              \
    static const char name##_place = 0; \
    T* const name = static_cast<T*>(::emulator::staticShared(&name##_place, sizeof(T) * (n)))
#define DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::emulator::dynamicShared())

using emulator::dim3;
#define threadIdx (::emulator::current().thread_index)
#define blockIdx (::emulator::current().block_index)
#define blockDim (::emulator::current().block_size)
#define gridDim (::emulator::current().grid_size)
#define __syncthreads() ::emulator::syncThreads(__FILE__, __LINE__)

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct __half {
    uint16_t bits;
};
struct __nv_bfloat16 {
    uint16_t bits;
};

inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i) word |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7u) & 0xFFu) << 8 * i;
    return word;
}

inline int atomicAdd(int* at, int value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* at, unsigned value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }
inline float atomicAdd(float* at, float value) {
    auto* word = reinterpret_cast<uint32_t*>(at);
    uint32_t old = __atomic_load_n(word, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(word, &old, __float_as_uint(__uint_as_float(old) + value), false,
                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return __uint_as_float(old);
}

namespace emulator {

template <class T>
struct Shuffle {
    T value;
    int from;
    T result;
};

template <class T>
T shuffle(unsigned mask, T value, int from, const char* file, int line) {
    Shuffle<T> mine{value, from, value};
    meet(mask, &mine, file, line, [](void* const* lanes, unsigned group) {
        for (int lane = 0; lane < 32; ++lane) {
            if (!(group >> lane & 1)) continue;
            auto& own = *static_cast<Shuffle<T>*>(lanes[lane]);
            if (!(group >> own.from & 1)) return "a shuffle reads a lane that is not in its mask";
            own.result = static_cast<Shuffle<T>*>(lanes[own.from])->value;
        }
        return static_cast<const char*>(nullptr);
    });
    return mine.result;
}

inline void checkAligned(const void* address, size_t alignment, const char* what) {
    if (reinterpret_cast<uintptr_t>(address) % alignment)
        fail("%s: address %p is not aligned to %zu", what, address, alignment);
}

/// Word by word, so that ThreadSanitizer sees every access.
inline void copy16(const Copy& copy) {
    for (int i = 0; i < 16; ++i)
        static_cast<volatile uint8_t*>(copy.to)[i] = i < copy.bytes ? static_cast<const uint8_t*>(copy.from)[i] : 0;
}

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int from, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return emulator::shuffle(mask, value, from & 31, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return emulator::shuffle(mask, value, emulator::lane() ^ bits, file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    const int lane = emulator::lane();
    return emulator::shuffle(mask, value, lane >= by ? lane - by : lane, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    const int lane = emulator::lane();
    return emulator::shuffle(mask, value, lane + by < 32 ? lane + by : lane, file, line);
}
inline unsigned __ballot_sync(unsigned mask, bool vote, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
    unsigned votes[2] = {vote, 0};
    emulator::meet(mask, votes, file, line, [](void* const* lanes, unsigned group) {
        unsigned all = 0;
        for (int lane = 0; lane < 32; ++lane)
            if (group >> lane & 1) all |= static_cast<unsigned*>(lanes[lane])[0] << lane;
        for (int lane = 0; lane < 32; ++lane)
            if (group >> lane & 1) static_cast<unsigned*>(lanes[lane])[1] = all;
        return static_cast<const char*>(nullptr);
    });
    return votes[1];
}

namespace chunkkv {

inline float toFloat(float x) { return x; }
inline float toFloat(__nv_bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float toFloat(__half x) {
    const uint32_t magnitude = (x.bits & 0x7FFFu) << 13;
    const float value = magnitude >= 0x0F800000u ? __uint_as_float(magnitude | 0x7F800000u)  // infinity, NaN
                                                 : __uint_as_float(magnitude) * 0x1p112f;
    return std::copysign(value, x.bits >> 15 ? -1.0f : 1.0f);
}

template <class T>
T fromFloat(float x);
template <>
inline float fromFloat<float>(float x) {
    return x;
}
template <>
inline __nv_bfloat16 fromFloat<__nv_bfloat16>(float x) {
    const uint32_t bits = __float_as_uint(x);
    const uint32_t rounded = bits + 0x7FFFu + (bits >> 16 & 1u);
    return {static_cast<uint16_t>(x != x ? 0x7FFFu : rounded >> 16)};
}
template <>
inline __half fromFloat<__half>(float x) {
    const uint32_t sign = __float_as_uint(x) & 0x80000000u;
    uint32_t bits = __float_as_uint(x) ^ sign;
    if (bits >= 0x47800000u) {
        bits = bits > 0x7F800000u ? 0x7FFFu : 0x7C00u;
    } else if (bits < 0x38800000u) {  // subnormal: adding 0.5 lets float addition do the rounding
        bits = __float_as_uint(__uint_as_float(bits) + 0.5f) - 0x3F000000u;
    } else {
        bits = (bits + 0xC8000FFFu + (bits >> 13 & 1u)) >> 13;
    }
    return {static_cast<uint16_t>(bits | sign >> 16)};
}

inline int multiprocessors() { return emulator::multiprocessors(); }

inline float exp2Fast(float x) { return std::exp2(x); }
inline float multiplyAdd(float a, float b, float c) { return a * b + c; }
inline float maxOrNan(float a, float b) { return a != a || a > b ? a : b; }

template <class T>
uint32_t packPair(float low, float high) {
    return fromFloat<T>(low).bits | static_cast<uint32_t>(fromFloat<T>(high).bits) << 16;
}

namespace emulated {
inline float lowHalf(uint32_t word) { return toFloat(__half{static_cast<uint16_t>(word)}); }
inline float highHalf(uint32_t word) { return toFloat(__half{static_cast<uint16_t>(word >> 16)}); }
}  // namespace emulated

inline uint32_t multiplyHalves(uint32_t a, uint32_t b) {
    return packPair<__half>(emulated::lowHalf(a) * emulated::lowHalf(b), emulated::highHalf(a) * emulated::highHalf(b));
}
inline uint32_t addHalves(uint32_t a, uint32_t b) {
    return packPair<__half>(emulated::lowHalf(a) + emulated::lowHalf(b), emulated::highHalf(a) + emulated::highHalf(b));
}

inline void storeScalar(float* to, float value) { *to = value; }
inline void storeScalar(uint32_t* to, uint32_t value) { *to = value; }
inline void storeScalar(float2* to, float2 value) {
    to->x = value.x;
    to->y = value.y;
}
template <class T>
void storeScalar(T* to, T value) {
    to->bits = value.bits;
}

using SharedAddress = char*;
inline SharedAddress sharedAddress(const void* place) { return static_cast<char*>(const_cast<void*>(place)); }
inline void cpAsync16(SharedAddress to, const void* from, int bytes) {
    emulator::checkAligned(to, 16, "cp.async");
    if (bytes > 0) emulator::checkAligned(from, 16, "cp.async");
    emulator::issueCopy({to, from, bytes, 0}, emulator::copy16);
}
using CachePolicy = uint64_t;
inline CachePolicy evictFirst() { return 0; }
inline void cpAsync16(SharedAddress to, const void* from, int bytes, CachePolicy) { cpAsync16(to, from, bytes); }
inline void cpAsyncCommit() { emulator::commitCopies(); }
template <int kPending>
void cpAsyncWait() {
    emulator::waitCopies(kPending, emulator::copy16);
}

inline void ldmatrixX4(uint32_t (&out)[4], SharedAddress row, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
    emulator::checkAligned(row, 16, "ldmatrix");
    struct Lane {
        uint32_t row[4], out[4];
    } mine;
    for (int i = 0; i < 4; ++i) mine.row[i] = reinterpret_cast<const uint32_t*>(row)[i];
    emulator::meet(emulator::kAllLanes, &mine, file, line, [](void* const* lanes, unsigned) {
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i)
                static_cast<Lane*>(lanes[lane])->out[i] = static_cast<Lane*>(lanes[8 * i + lane / 4])->row[lane % 4];
        return static_cast<const char*>(nullptr);
    });
    for (int i = 0; i < 4; ++i) out[i] = mine.out[i];
}

namespace emulated {
template <class T>
float halfOf(uint32_t word, int high) {
    return toFloat(T{static_cast<uint16_t>(high ? word >> 16 : word)});
}
struct MmaLane {
    float d[4];
    uint32_t a[4], b[2];
};
template <class T>
const char* multiply(void* const* lanes, unsigned) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto& own = *static_cast<MmaLane*>(lanes[lane]);
        for (int i = 0; i < 4; ++i)
            for (int high = 0; high < 2; ++high)
                a[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8 + high] = halfOf<T>(own.a[i], high);
        for (int i = 0; i < 2; ++i)
            for (int high = 0; high < 2; ++high) b[lane % 4 * 2 + i * 8 + high][lane / 4] = halfOf<T>(own.b[i], high);
    }
    for (int lane = 0; lane < 32; ++lane) {
        auto& own = *static_cast<MmaLane*>(lanes[lane]);
        for (int i = 0; i < 4; ++i) {
            double sum = own.d[i];
            for (int k = 0; k < 16; ++k) sum += double{a[lane / 4 + i / 2 * 8][k]} * b[k][lane % 4 * 2 + i % 2];
            own.d[i] = static_cast<float>(sum);
        }
    }
    return nullptr;
}
}  // namespace emulated

template <class T>
void mma16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
    emulated::MmaLane mine{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    emulator::meet(emulator::kAllLanes, &mine, file, line, emulated::multiply<T>);
    for (int i = 0; i < 4; ++i) d[i] = mine.d[i];
}

template <class T>
void mma16816First(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
    for (float& sum : d) sum = 0.0f;
    mma16816<T>(d, a, b0, b1, file, line);
}

/// Launches run one after the other.
inline void waitForPrevious() {}
inline void letNextStart() {}

}  // namespace chunkkv
