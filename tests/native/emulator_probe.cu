// Kernels that show what the emulator does, and what it refuses. Each entry returns 0, or 1 with a text.
#include "dev.h"

namespace {

using namespace chunkkv;

struct Buffers {
    const void* in;
    void* out;
    int count;
};

template <class T>
T* out(const Buffers& b) {
    return static_cast<T*>(b.out);
}
template <class T>
const T* in(const Buffers& b) {
    return static_cast<const T*>(b.in);
}

__global__ void convert(const Buffers b) {
    // in: count words; out: per word float16 as float, e4m3 as float, int8 as float, then rounded to both half types;
    // then the four e4m3 and the four int8 of the word by way of float16.
    for (int i = threadIdx.x; i < b.count; i += blockDim.x) {
        const uint32_t word = in<uint32_t>(b)[i];
        float* row = out<float>(b) + 13 * i;
        row[0] = emulated::lowHalf(word);
        row[1] = e4m3ToFloat(word & 0xFF);
        row[2] = int8ToFloat(word & 0xFF);
        row[3] = toFloat(fromFloat<__half>(__uint_as_float(word)));
        row[4] = toFloat(fromFloat<__nv_bfloat16>(__uint_as_float(word)));
        uint32_t fp8[2], int8[2];
        e4m3ToHalves(word, fp8);
        int8ToHalves(word, int8);
        for (int j = 0; j < 4; ++j) {
            row[5 + j] = j % 2 ? emulated::highHalf(fp8[j / 2]) : emulated::lowHalf(fp8[j / 2]);
            row[9 + j] = j % 2 ? emulated::highHalf(int8[j / 2]) : emulated::lowHalf(int8[j / 2]);
        }
    }
}

__global__ void warp(const Buffers b) {
    const int own = in<int>(b)[threadIdx.x];
    int* row = out<int>(b) + 6 * threadIdx.x;
    row[0] = __shfl_sync(kFullWarp, own, 5);
    row[1] = __shfl_xor_sync(kFullWarp, own, 3);
    row[2] = __shfl_up_sync(kFullWarp, own, 2);
    row[3] = __shfl_down_sync(kFullWarp, own, 2);
    row[4] = static_cast<int>(__ballot_sync(kFullWarp, own % 2));
    const unsigned half = threadIdx.x % 32 < 16 ? 0x0000FFFFu : 0xFFFF0000u;
    row[5] = __shfl_xor_sync(half, own, 1);
}

__global__ void product(const Buffers b) {
    // in: A [16,16], then B as [8 tokens,16], float16; out: C [16,8] += A B^T.
    SHARED(__half, tile, 16 * 24 + 8);
    const int lane = threadIdx.x;
    for (int i = lane; i < 16 * 24; i += 32) storeScalar(tile + i, in<__half>(b)[i]);
    __syncthreads();
    uint32_t a[4], key[4];
    const int matrix = lane / 8, row = lane % 8;
    ldmatrixX4(a, sharedAddress(tile + (matrix % 2 * 8 + row) * 16 + matrix / 2 * 8));
    ldmatrixX4(key, sharedAddress(tile + 256 + row * 16 + matrix % 2 * 8));
    float sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = out<float>(b)[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2];
    mma16816<__half>(sums, a, key[0], key[1]);
    for (int i = 0; i < 4; ++i) out<float>(b)[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

__global__ void asyncCopy(const Buffers b) {
    // The first 16 bytes are waited for, the second only committed; b.count bytes of the first are copied.
    SHARED(uint4, stage, 2);
    cpAsync16(sharedAddress(stage), b.in, b.count);
    cpAsyncCommit();
    cpAsync16(sharedAddress(stage + 1), b.in, 16);
    cpAsyncCommit();
    cpAsyncWait<1>();
    for (int i = 0; i < 8; ++i) out<uint32_t>(b)[i] = reinterpret_cast<uint32_t*>(stage)[i];
}

__global__ void order(const Buffers b) {
    SHARED(int, next, 1);
    if (threadIdx.x == 0) next[0] = 0;
    __syncthreads();
    for (int round = 0; round < 2; ++round) {
        out<int>(b)[atomicAdd(next, 1)] = static_cast<int>(threadIdx.x);
        __shfl_sync(kFullWarp, 0, 0);
    }
    atomicAdd(out<float>(b) + 128, 0.5f);
}

__global__ void poison(const Buffers b) {
    SHARED(float, fixed, 3);
    DYNAMIC_SHARED(float, dynamic);
    out<float>(b)[0] = fixed[2];
    out<float>(b)[1] = dynamic[b.count / 4 - 1];
}

__global__ void oneBarrierEach(const Buffers) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
}
__global__ void warpWaitsForExited(const Buffers) {
    if (threadIdx.x == 7) return;
    __shfl_sync(kFullWarp, 1, 0);
}
__global__ void barrierWithoutExited(const Buffers b) {
    if (threadIdx.x % 2) return;
    __syncthreads();
    out<int>(b)[threadIdx.x] = 1;
}
__global__ void twoCollectives(const Buffers) {
    if (threadIdx.x % 2)
        __shfl_sync(kFullWarp, 1, 0);
    else
        __ballot_sync(kFullWarp, true);
}
__global__ void notInItsMask(const Buffers) { __shfl_sync(0xFFFFu, 1, 0); }
__global__ void fromOutsideItsMask(const Buffers) {
    if (threadIdx.x < 16) __shfl_sync(0xFFFFu, 1, 20);
}
__global__ void misalignedMatrix(const Buffers) {
    SHARED(char, tile, 1024);
    uint32_t words[4];
    ldmatrixX4(words, sharedAddress(tile + 8));
}
__global__ void misalignedCopy(const Buffers b) {
    SHARED(uint4, tile, 1);
    cpAsync16(sharedAddress(tile), in<char>(b) + 4, 16);
}

struct Entry {
    const char* name;
    void (*kernel)(const Buffers);
};
const Entry kEntries[] = {
    {"convert", convert},
    {"warp", warp},
    {"product", product},
    {"async copy", asyncCopy},
    {"order", order},
    {"poison", poison},
    {"one barrier each", oneBarrierEach},
    {"a warp waits for a thread that has exited", warpWaitsForExited},
    {"a barrier does not wait for threads that have exited", barrierWithoutExited},
    {"two collectives", twoCollectives},
    {"not in its mask", notInItsMask},
    {"from outside its mask", fromOutsideItsMask},
    {"misaligned matrix", misalignedMatrix},
    {"misaligned copy", misalignedCopy},
};

}  // namespace

extern "C" {
__attribute__((visibility("default"))) int probe_run(const char* name, int blocks, int threads, int shared_bytes,
                                                     const void* in, void* out, int count) {
    for (const Entry& entry : kEntries)
        if (std::strcmp(entry.name, name) == 0)
            return emulator::launch(entry.kernel, dim3(blocks), dim3(threads), shared_bytes, Buffers{in, out, count});
    return -1;
}
__attribute__((visibility("default"))) const char* probe_failure() { return emulator::failureText(); }
}
