// Host side of the kernels: what api.cc calls after it has validated the parameters.
#pragma once

#include <cstddef>

#include "chunkkv/params.h"

namespace chunkkv {

/// A cudaError_t, or what the emulator returns; 0 = success.
using LaunchStatus = int;

LaunchStatus launchBoundaries(const BoundariesParams& params, void* stream);
LaunchStatus launchScore(const ScoreParams& params, void* workspace, void* stream);
LaunchStatus launchSelect(const SelectParams& params, void* stream);
LaunchStatus launchCompact(const CompactParams& params, void* stream);
LaunchStatus launchRope(const RopeParams& params, void* stream);
LaunchStatus launchPrepare(const PrepareParams& params, void* stream);

/// Enqueue on `stream`; `bytes` may be 0.
LaunchStatus copyBytes(void* to, const void* from, size_t bytes, void* stream);
LaunchStatus clearBytes(void* to, size_t bytes, void* stream);

/// Synchronous. *device is NULL on failure.
LaunchStatus uploadBytes(const void* host, size_t bytes, void** device);
LaunchStatus releaseBytes(void* device);

/// Bytes that launchScore uses from its workspace; pointers in `params` are not read.
size_t scoreWorkspaceBytes(const ScoreParams& params);

/// "cuda" or "emulated".
const char* deviceName();

/// What a status that is not 0 means; for the emulator, of the last launch.
const char* launchErrorText(LaunchStatus status);

}  // namespace chunkkv
