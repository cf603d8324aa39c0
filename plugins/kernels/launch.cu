// What the host may ask about launches, answered where the CUDA runtime is known.
#include "launch.cuh"

namespace chunkkv {

#if defined(__CUDACC__)
const char* deviceName() { return "cuda"; }
const char* launchErrorText(LaunchStatus status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }
#else
const char* deviceName() { return "emulated"; }
const char* launchErrorText(LaunchStatus) { return emulator::failureText(); }
#endif

}  // namespace chunkkv
