// Device memory as the host handles it: the only place that copies, clears, allocates and frees.
#include <cstdlib>
#include <cstring>

#include "launch.cuh"

namespace chunkkv {

#if defined(__CUDACC__)
namespace {

/// Return the status, and clear it in the CUDA runtime, so that no later call reports it.
LaunchStatus taken(cudaError_t status) {
    if (status != cudaSuccess) cudaGetLastError();
    return status;
}

}  // namespace

LaunchStatus copyBytes(void* to, const void* from, size_t bytes, void* stream) {
    return taken(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)));
}

LaunchStatus clearBytes(void* to, size_t bytes, void* stream) {
    return taken(cudaMemsetAsync(to, 0, bytes, static_cast<cudaStream_t>(stream)));
}

LaunchStatus uploadBytes(const void* host, size_t bytes, void** device) {
    *device = nullptr;
    void* memory = nullptr;
    cudaError_t status = cudaMalloc(&memory, bytes);
    if (status != cudaSuccess) return taken(status);
    status = cudaMemcpy(memory, host, bytes, cudaMemcpyHostToDevice);
    // A small copy returns when its source has been read: without this, streams that do not wait for the default
    // stream could read the table before it is there.
    if (status == cudaSuccess) status = cudaStreamSynchronize(nullptr);
    if (status == cudaSuccess) {
        *device = memory;
        return status;
    }
    cudaFree(memory);
    return taken(status);
}

LaunchStatus releaseBytes(void* device) { return taken(cudaFree(device)); }

#else

LaunchStatus copyBytes(void* to, const void* from, size_t bytes, void*) {
    emulator::countEnqueued();
    if (bytes > 0) std::memcpy(to, from, bytes);
    return 0;
}

LaunchStatus clearBytes(void* to, size_t bytes, void*) {
    emulator::countEnqueued();
    if (bytes > 0) std::memset(to, 0, bytes);
    return 0;
}

LaunchStatus uploadBytes(const void* host, size_t bytes, void** device) {
    *device = std::malloc(bytes);
    if (*device == nullptr) return 2;  // what CUDA calls it
    std::memcpy(*device, host, bytes);
    return 0;
}

LaunchStatus releaseBytes(void* device) {
    std::free(device);
    return 0;
}

#endif

}  // namespace chunkkv
