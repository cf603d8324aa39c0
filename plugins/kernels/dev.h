// The device vocabulary: everything a kernel may use besides C++ and the headers in plugins/include. Under nvcc it is
// CUDA and PTX; under any other compiler plugins/emulator supplies the same names and runs the same kernels on the
// host. Kernels include this file and hold no #if of their own.
//
// Shared by both: threadIdx, blockIdx, blockDim, gridDim, dim3, uint4, float2, __half, __nv_bfloat16, __syncthreads(),
// __shfl_sync, __shfl_up_sync, __shfl_xor_sync, __ballot_sync, __ffs, __byte_perm, atomicAdd(int*), __float_as_uint,
// __uint_as_float, and what is declared below.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

/// An array of n elements that the block shares; unset until written.
#define SHARED(T, name, n) __shared__ T name[n]
/// The dynamic shared memory of the launch, 16-byte aligned.
#define DYNAMIC_SHARED(T, name)                                     \
    extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
    T* const name = reinterpret_cast<T*>(dynamic_shared)

namespace chunkkv {

__device__ __forceinline__ float toFloat(float x) { return x; }
__device__ __forceinline__ float toFloat(__half x) { return __half2float(x); }
__device__ __forceinline__ float toFloat(__nv_bfloat16 x) { return __bfloat162float(x); }

/// Round to nearest, ties to even.
template <class T>
__device__ T fromFloat(float x);
template <>
__device__ __forceinline__ float fromFloat<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __half fromFloat<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 fromFloat<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

/// 2^x to two units in the last place; 0 for -infinity and where it is below 2^-126.
__device__ __forceinline__ float exp2Fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// Of the current device; called by the host to size a grid.
inline int multiprocessors() {
    int device = 0, count = 0;
    const bool known = cudaGetDevice(&device) == cudaSuccess &&
                       cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
    return known ? count : 1;
}

/// Blocks of a multiprocessor to ask for in a launch bound: for compute capability 12.0 the compiler takes more
/// registers than for others, so only half as many fit without spills.
constexpr int blocksThatFit(int blocks) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
    return blocks / 2;
#else
    return blocks;
#endif
}

/// Two values rounded to T, `low` in the low half of the word.
template <class T>
__device__ uint32_t packPair(float low, float high);
template <>
__device__ __forceinline__ uint32_t packPair<__half>(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
template <>
__device__ __forceinline__ uint32_t packPair<__nv_bfloat16>(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

/// Two float16 in a word: their products with, and their sums with, the same float16 pair.
__device__ __forceinline__ uint32_t multiplyHalves(uint32_t a, uint32_t b) {
    uint32_t word;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
}
__device__ __forceinline__ uint32_t addHalves(uint32_t a, uint32_t b) {
    uint32_t word;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
}

/// a * b + c, rounded once; the emulator rounds twice.
__device__ __forceinline__ float multiplyAdd(float a, float b, float c) { return __fmaf_rn(a, b, c); }

/// The larger value; NaN where one is NaN.
__device__ __forceinline__ float maxOrNan(float a, float b) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

/// *to = value. The emulator stores it so that ThreadSanitizer sees the access.
template <class T>
__device__ __forceinline__ void storeScalar(T* to, T value) {
    *to = value;
}

/// A place in shared memory, to which bytes can be added: what its instructions take, with nothing to compute.
using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress sharedAddress(const void* place) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(place));
}

/// Start to copy 16 bytes to shared memory: the first `bytes` from `from`, the others zero. Both 16-byte aligned.
__device__ __forceinline__ void cpAsync16(SharedAddress to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
/// What the second-level cache does with bytes that are read: evictFirst() for those that nobody reads again soon.
using CachePolicy = uint64_t;
__device__ __forceinline__ CachePolicy evictFirst() {
    CachePolicy policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ void cpAsync16(SharedAddress to, const void* from, int bytes, CachePolicy policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from), "r"(bytes),
                 "l"(policy)
                 : "memory");
}
/// Close a group of copies of this thread; cpAsyncWait<n> waits for all but the last n groups.
__device__ __forceinline__ void cpAsyncCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void cpAsyncWait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Lanes 8i..8i+7 give the 16-byte rows of matrix i; lane l gets the words at column l % 4 of row l / 4 of each.
__device__ __forceinline__ void ldmatrixX4(uint32_t (&out)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row)
                 : "memory");
}

/// d [16,8] += a [16,16] * b [16,8] of type T in float32, in the fragments of mma.m16n8k16 (row, col).
template <class T>
__device__ void mma16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma16816<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma16816<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                        uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// The same with sums of zero to begin with.
template <class T>
__device__ void mma16816First(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma16816First<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %10, %10, %10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}
template <>
__device__ __forceinline__ void mma16816First<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                             uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %10, %10, %10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

/// Programmatic dependent launch: a kernel that is launched so may start before the one before it has ended, and waits
/// here for the end of that one and for its writes. letNextStart() lets the next kernel start as soon as all blocks
/// have called it. Both do nothing where a kernel is launched the plain way, and before compute capability 9.0.
__device__ __forceinline__ void waitForPrevious() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void letNextStart() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace chunkkv

#else

#include "device_emulation.h"

#endif

namespace chunkkv {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;

/// An e4m3 byte as float: its exponent has bias 7, so the bits one place up, times 2^(127-7), are the value.
__device__ inline float e4m3ToFloat(uint32_t byte) {
    const float magnitude = __uint_as_float((byte & 0x7Fu) << 20) * 0x1p120f;
    const float value = (byte & 0x7Fu) == 0x7Fu ? __uint_as_float(0x7FC00000u) : magnitude;
    return __uint_as_float(__float_as_uint(value) | (byte & 0x80u) << 24);
}

/// An int8 byte as float: the low mantissa bits of 2^23 count in ones.
__device__ inline float int8ToFloat(uint32_t byte) {
    return __uint_as_float(0x4B000000u | (byte ^ 0x80u)) - (0x1p23f + 128.0f);
}

/// Four int8 of a word as two words of float16: 0x6400 and a byte are 1024 and more.
__device__ inline void int8ToHalves(uint32_t four, uint32_t (&halves)[2]) {
    constexpr uint32_t kThousands = 0x64646464u, kMinus1152 = 0xE480E480u;
    const uint32_t shifted = four ^ 0x80808080u;
    halves[0] = addHalves(__byte_perm(shifted, kThousands, 0x4140), kMinus1152);
    halves[1] = addHalves(__byte_perm(shifted, kThousands, 0x4342), kMinus1152);
}

/// Two e4m3 bytes, each the upper one of a 16-bit half, as float16. The bits one place down have the bias of e4m3 in
/// the place of float16's: a product with 2^8 makes up for it. 0x7F is NaN.
__device__ inline uint32_t e4m3PairToHalves(uint32_t pair) {
    const uint32_t magnitude = pair & 0x7F007F00u;
    const uint32_t is_nan = (magnitude + 0x01000100u) & 0x80008000u;
    const uint32_t nan_bits = is_nan - (is_nan >> 6);  // 0x7E00 where it is
    const uint32_t scaled = multiplyHalves(magnitude >> 1 | (pair & 0x80008000u), 0x5C005C00u);
    return scaled | nan_bits;
}

/// Four e4m3 of a word as two words of float16.
__device__ inline void e4m3ToHalves(uint32_t four, uint32_t (&halves)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.rn.f16x2.e4m3x2 %0, low;\n"
        "cvt.rn.f16x2.e4m3x2 %1, high;\n}"
        : "=r"(halves[0]), "=r"(halves[1])
        : "r"(four));
#else
    halves[0] = e4m3PairToHalves(__byte_perm(four, 0u, 0x1404));
    halves[1] = e4m3PairToHalves(__byte_perm(four, 0u, 0x3424));
#endif
}

}  // namespace chunkkv
