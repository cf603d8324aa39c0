// The only place that launches kernels: device launch under nvcc, the emulator otherwise.
#pragma once

#include "dev.h"
#include "ops.h"

namespace chunkkv {

constexpr size_t kDefaultSharedBytes = 48 * 1024;

inline int64_t ceilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// After: kStream waits for all earlier work of the stream; kKernel is for a kernel that calls waitForPrevious() first
/// of all, launched right behind another kernel of the same call, whose end it need not wait for to be launched.
enum class After { kStream, kKernel };

#if defined(__CUDACC__)
/// Whether the current device launches kernels ahead of the end of the one before.
inline bool launchesAhead() {
    int device = 0, major = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
}

/// Let the kernel have this much shared memory, in as many blocks at a time as the multiprocessor has room for.
inline cudaError_t allowShared(const void* entry, size_t shared_bytes) {
    if (shared_bytes == 0) return cudaSuccess;
    const cudaError_t status = cudaFuncSetAttribute(entry, cudaFuncAttributePreferredSharedMemoryCarveout,
                                                    cudaSharedmemCarveoutMaxShared);
    if (status != cudaSuccess || shared_bytes <= kDefaultSharedBytes) return status;
    return cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
}
#endif

/// Blocks of the kernel that the device runs at the same time: the grid of a kernel that divides its work itself.
template <class P>
int64_t residentBlocks(void (*kernel)(const P), int threads, size_t shared_bytes) {
    int each = 3;
#if defined(__CUDACC__)
    const void* entry = reinterpret_cast<const void*>(kernel);
    if (allowShared(entry, shared_bytes) != cudaSuccess ||
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, entry, threads, shared_bytes) != cudaSuccess || each < 1) {
        cudaGetLastError();
        each = 1;
    }
#else
    (void)kernel, (void)threads, (void)shared_bytes;
#endif
    return int64_t{each} * multiprocessors();
}

/// Launch kernel(params) and return the status; a grid with a side of 0 launches nothing. The error of a failed launch
/// is cleared in the CUDA runtime, so that no later call reports it.
template <class P>
LaunchStatus launch(void (*kernel)(const P), dim3 grid, dim3 block, size_t shared_bytes, void* stream, const P& params,
                    After after = After::kStream) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
#if defined(__CUDACC__)
    const void* entry = reinterpret_cast<const void*>(kernel);
    void* arguments[] = {const_cast<P*>(&params)};
    cudaError_t status = allowShared(entry, shared_bytes);
    if (status == cudaSuccess) {
        cudaLaunchAttribute ahead{};
        ahead.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        ahead.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = grid;
        config.blockDim = block;
        config.dynamicSmemBytes = shared_bytes;
        config.stream = static_cast<cudaStream_t>(stream);
        config.attrs = &ahead;
        config.numAttrs = after == After::kKernel && launchesAhead() ? 1 : 0;
        status = cudaLaunchKernelExC(&config, entry, arguments);
    }
    if (status != cudaSuccess) cudaGetLastError();  // clear it, so that the next call is judged on its own
    return status;
#else
    (void)stream;
    if (after == After::kKernel) emulator::countAhead();
    return emulator::launch(kernel, grid, block, shared_bytes, params);
#endif
}

}  // namespace chunkkv
