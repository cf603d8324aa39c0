// The only place that launches kernels: device launch under nvcc, the emulator otherwise.
#pragma once

#include "dev.h"
#include "ops.h"

namespace chunkkv {

constexpr size_t kDefaultSharedBytes = 48 * 1024;

inline int64_t ceilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Launch kernel(params) and return the status; a grid with a side of 0 launches nothing. The error of a failed launch
/// is cleared in the CUDA runtime, so that no later call reports it.
template <class P>
LaunchStatus launch(void (*kernel)(const P), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                    const P& params) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
#if defined(__CUDACC__)
    const void* entry = reinterpret_cast<const void*>(kernel);
    void* arguments[] = {const_cast<P*>(&params)};
    cudaError_t status = cudaSuccess;
    if (shared_bytes > kDefaultSharedBytes)
        status =
            cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (status == cudaSuccess)
        status = cudaLaunchKernel(entry, grid, block, arguments, shared_bytes, static_cast<cudaStream_t>(stream));
    if (status != cudaSuccess) cudaGetLastError();  // clear it, so that the next call is judged on its own
    return status;
#else
    (void)stream;
    return emulator::launch(kernel, grid, block, shared_bytes, params);
#endif
}

}  // namespace chunkkv
