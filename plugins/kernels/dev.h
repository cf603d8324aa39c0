// The device vocabulary: everything a kernel may use besides C++ and the headers in plugins/include. Under nvcc it is
// CUDA and PTX; under any other compiler plugins/emulator supplies the same names and runs the same kernels on the
// host. Kernels include this file and hold no #if of their own.
//
// Shared by both: threadIdx, blockIdx, blockDim, gridDim, dim3, uint4, __half, __nv_bfloat16, __syncthreads(),
// __shfl_sync, __shfl_up_sync, __shfl_xor_sync, __ballot_sync, atomicAdd(int*), __float_as_uint, __uint_as_float, and
// what is declared below.
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

/// The two halves of a word of float16.
__device__ __forceinline__ float lowHalf(uint32_t word) { return __half2float(__ushort_as_half(word & 0xFFFFu)); }
__device__ __forceinline__ float highHalf(uint32_t word) { return __half2float(__ushort_as_half(word >> 16)); }

/// *to = value. The emulator stores it so that ThreadSanitizer sees the access.
template <class T>
__device__ __forceinline__ void storeScalar(T* to, T value) {
    *to = value;
}

/// Start to copy 16 bytes to shared memory: the first `bytes` from `from`, the others zero. Both 16-byte aligned.
__device__ __forceinline__ void cpAsync16(void* to, const void* from, int bytes) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}
/// Close a group of copies of this thread; cpAsyncWait<n> waits for all but the last n groups.
__device__ __forceinline__ void cpAsyncCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void cpAsyncWait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Lanes 8i..8i+7 give the 16-byte rows of matrix i; lane l gets the words at column l % 4 of row l / 4 of each.
__device__ __forceinline__ void ldmatrixX4(uint32_t (&out)[4], const void* row) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
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

}  // namespace chunkkv
