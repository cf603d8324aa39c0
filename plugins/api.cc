// The C ABI: checks parameters, calls the kernels' host side, reports what they say.
#include "checks.h"
#include "kernels/ops.h"
#include "nvtx.h"

using namespace chunkkv;

namespace {

constexpr int64_t kWorkspaceAlignment = 256;

chunkkv_status reported(LaunchStatus status) {
    if (status == 0) return CHUNKKV_OK;
    fail(CHUNKKV_CUDA_ERROR, "CUDA error %d: %s", status, launchErrorText(status));
    return failure.status;
}

template <class Params>
bool begin(const char* op, const Params* params) {
    current_op = op;
    return params ? true : fail(CHUNKKV_INVALID_ARGUMENT, "the parameter struct is NULL");
}

}  // namespace

extern "C" {

int32_t chunkkv_abi_version(void) { return CHUNKKV_ABI_VERSION; }

const char* chunkkv_device(void) { return deviceName(); }

const char* chunkkv_last_error(void) { return failure.text; }

size_t chunkkv_params_size(int32_t op) {
    constexpr size_t kSizes[] = {sizeof(BoundariesParams), sizeof(ScoreParams), sizeof(SelectParams),
                                 sizeof(CompactParams),    sizeof(RopeParams),  sizeof(PrepareParams)};
    return op >= CHUNKKV_OP_BOUNDARIES && op <= CHUNKKV_OP_PREPARE ? kSizes[op] : 0;
}

chunkkv_status chunkkv_supports(int32_t op, int32_t query_dtype, int32_t kv_dtype, int32_t head_dim, int32_t group) {
    current_op = "chunkkv_supports";
    bool supported = true;
    if (op == CHUNKKV_OP_SCORE) {
        supported = isScoreKernel(query_dtype, kv_dtype, head_dim, group);
    } else if (op == CHUNKKV_OP_COMPACT) {
        supported = isHeadSize(head_dim) && inRange("kv_dtype", kv_dtype, CHUNKKV_FLOAT32, CHUNKKV_FP8_E4M3);
    } else if (op == CHUNKKV_OP_ROPE) {
        supported = isFloating("query_dtype", query_dtype) && isRopeHead(head_dim);
    } else {
        supported = inRange("op", op, CHUNKKV_OP_BOUNDARIES, CHUNKKV_OP_PREPARE);
    }
    return supported ? CHUNKKV_OK : CHUNKKV_UNSUPPORTED;
}

int64_t chunkkv_kept_tokens(const chunkkv_settings* settings, int64_t length) {
    if (!(begin("chunkkv_kept_tokens", settings) && checkSettings(*settings) &&
          inRange("length", length, 0, CHUNKKV_MAX_LENGTH)))
        return -1;
    return keptTokens(*settings, length, settings->keep_per_10k, settings->budget_tokens);
}

int64_t chunkkv_max_chunks(const chunkkv_settings* settings, int64_t length) {
    if (!(begin("chunkkv_max_chunks", settings) && checkSettings(*settings) &&
          inRange("length", length, 0, CHUNKKV_MAX_LENGTH)))
        return -1;
    return maxChunks(*settings, length);
}

chunkkv_status chunkkv_score_workspace(const chunkkv_score_params* params, size_t* bytes) {
    if (!(begin("chunkkv_score_workspace", params) && isGiven("bytes", bytes) && checkScoreShape(*params)))
        return failure.status;
    *bytes = scoreWorkspaceBytes(*params);
    return CHUNKKV_OK;
}

chunkkv_status chunkkv_boundaries(const chunkkv_boundaries_params* params, void* stream) {
    if (!(begin("chunkkv_boundaries", params) && checkBoundaries(*params))) return failure.status;
    const StageRange range("boundaries", 0);
    return reported(launchBoundaries(*params, stream));
}

chunkkv_status chunkkv_score(const chunkkv_score_params* params, void* workspace, size_t workspace_bytes,
                             void* stream) {
    if (!(begin("chunkkv_score", params) && checkScore(*params))) return failure.status;
    const size_t needed = scoreWorkspaceBytes(*params);
    if (workspace_bytes < needed ||
        (needed > 0 && (!workspace || reinterpret_cast<uintptr_t>(workspace) % kWorkspaceAlignment))) {
        fail(CHUNKKV_WORKSPACE, "the workspace %p has %zu bytes; pass %zu bytes, aligned to %lld", workspace,
             workspace_bytes, needed, static_cast<long long>(kWorkspaceAlignment));
        return failure.status;
    }
    const StageRange range("score", mostKept(params->rows, params->settings));
    return reported(launchScore(*params, workspace, stream));
}

chunkkv_status chunkkv_select(const chunkkv_select_params* params, void* stream) {
    if (!(begin("chunkkv_select", params) && checkSelect(*params))) return failure.status;
    const StageRange range("select", int64_t{params->rows.batch} * params->max_kept);
    return reported(launchSelect(*params, stream));
}

chunkkv_status chunkkv_compact(const chunkkv_compact_params* params, void* stream) {
    if (!(begin("chunkkv_compact", params) && checkCompact(*params))) return failure.status;
    const StageRange range("compact", int64_t{params->rows.batch} * params->max_kept);
    return reported(launchCompact(*params, stream));
}

chunkkv_status chunkkv_rope(const chunkkv_rope_params* params, void* stream) {
    if (!(begin("chunkkv_rope", params) && checkRope(*params))) return failure.status;
    const StageRange range("rope", 0);
    return reported(launchRope(*params, stream));
}

chunkkv_status chunkkv_prepare(const chunkkv_prepare_params* params, void* stream) {
    if (!(begin("chunkkv_prepare", params) && checkPrepare(*params))) return failure.status;
    const StageRange range("prepare", 0);
    return reported(launchPrepare(*params, stream));
}

chunkkv_status chunkkv_copy(void* to, const void* from, size_t bytes, void* stream) {
    current_op = "chunkkv_copy";
    if (!checkCopy(to, from, bytes)) return failure.status;
    return to == from || bytes == 0 ? CHUNKKV_OK : reported(copyBytes(to, from, bytes, stream));
}

chunkkv_status chunkkv_zero(void* to, size_t bytes, void* stream) {
    current_op = "chunkkv_zero";
    if (bytes > 0 && !isGiven("to", to)) return failure.status;
    return bytes == 0 ? CHUNKKV_OK : reported(clearBytes(to, bytes, stream));
}

chunkkv_status chunkkv_upload(const void* host, size_t bytes, void** device) {
    current_op = "chunkkv_upload";
    if (device) *device = nullptr;
    if (!(device && host && bytes > 0)) {
        fail(CHUNKKV_INVALID_ARGUMENT,
             "host is %p, bytes is %zu, device is %p; pass a table of at least one byte, "
             "and where to write its address",
             host, bytes, static_cast<void*>(device));
        return failure.status;
    }
    return reported(uploadBytes(host, bytes, device));
}

chunkkv_status chunkkv_release(void* device) {
    current_op = "chunkkv_release";
    return device ? reported(releaseBytes(device)) : CHUNKKV_OK;
}

}  // extern "C"
