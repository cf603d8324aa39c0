/* C ABI of libchunkkv. Functions that take a stream enqueue work on `stream` (a cudaStream_t) of the current device
 * and return: they never allocate, synchronise or read device data, so that they can be captured in a CUDA graph. A
 * parameter struct is copied; the device memory it names must live until the stream is done with it.
 * Thread safe: calls may run on any number of threads; the message is kept per thread. */
#ifndef CHUNKKV_CHUNKKV_H
#define CHUNKKV_CHUNKKV_H

#include <stddef.h>
#include <stdint.h>

#include "chunkkv/params.h"

#if defined(__GNUC__)
#define CHUNKKV_API __attribute__((visibility("default")))
#else
#define CHUNKKV_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Grows by one with every change to params.h or to a function below. */
enum { CHUNKKV_ABI_VERSION = 3 };

typedef enum chunkkv_status {
    CHUNKKV_OK = 0,
    CHUNKKV_INVALID_ARGUMENT = 1, /* a value is out of range, or a pointer is missing */
    CHUNKKV_UNSUPPORTED = 2,      /* no kernel for this type, head size or group */
    CHUNKKV_WORKSPACE = 3,        /* the workspace is missing, too small or not aligned to 256 bytes */
    CHUNKKV_CUDA_ERROR = 4        /* a launch failed; the message holds CUDA's text */
} chunkkv_status;

enum {
    CHUNKKV_OP_BOUNDARIES = 0,
    CHUNKKV_OP_SCORE = 1,
    CHUNKKV_OP_SELECT = 2,
    CHUNKKV_OP_COMPACT = 3,
    CHUNKKV_OP_ROPE = 4,
    CHUNKKV_OP_PREPARE = 5
};

/* The CHUNKKV_ABI_VERSION this library was built with. */
CHUNKKV_API int32_t chunkkv_abi_version(void);

/* "cuda", or "emulated": kernels run on the host before a launch returns, and pointers are host pointers. */
CHUNKKV_API const char* chunkkv_device(void);

/* What the last call on this thread that did not return CHUNKKV_OK was given and what is allowed; never NULL. */
CHUNKKV_API const char* chunkkv_last_error(void);

/* sizeof the parameter struct of a CHUNKKV_OP_*, or 0: lets a binding check its own declaration. */
CHUNKKV_API size_t chunkkv_params_size(int32_t op);

/* CHUNKKV_OK where `op` has a kernel for head size D, Hq/Hkv = group, and these types (CHUNKKV_FLOAT32, ...);
 * else CHUNKKV_UNSUPPORTED, with the allowed values in the message. */
CHUNKKV_API chunkkv_status chunkkv_supports(int32_t op, int32_t query_dtype, int32_t kv_dtype, int32_t head_dim,
                                            int32_t group);

/* N(length), the tokens that the settings' head class keeps of a prompt of `length` tokens, or -1 for invalid settings
 * or a negative length. */
CHUNKKV_API int64_t chunkkv_kept_tokens(const chunkkv_settings* settings, int64_t length);

/* The most chunks that a row of up to `length` tokens can have, or -1 for invalid settings or a negative length. */
CHUNKKV_API int64_t chunkkv_max_chunks(const chunkkv_settings* settings, int64_t length);

/* Bytes of workspace that chunkkv_score needs for these sizes, types and settings, padded or packed; of the pointers
 * only whether token_scores is NULL counts. More rows or a larger max_length never need less. The workspace may hold
 * anything on entry, is aligned to 256 bytes, and is free again when the stream has passed the call. */
CHUNKKV_API chunkkv_status chunkkv_score_workspace(const chunkkv_score_params* params, size_t* bytes);

CHUNKKV_API chunkkv_status chunkkv_boundaries(const chunkkv_boundaries_params* params, void* stream);
CHUNKKV_API chunkkv_status chunkkv_score(const chunkkv_score_params* params, void* workspace, size_t workspace_bytes,
                                         void* stream);
CHUNKKV_API chunkkv_status chunkkv_select(const chunkkv_select_params* params, void* stream);
CHUNKKV_API chunkkv_status chunkkv_compact(const chunkkv_compact_params* params, void* stream);
CHUNKKV_API chunkkv_status chunkkv_rope(const chunkkv_rope_params* params, void* stream);
CHUNKKV_API chunkkv_status chunkkv_prepare(const chunkkv_prepare_params* params, void* stream);

/* Enqueue, like the ops: copy `bytes` of device memory (ranges that overlap are refused, but for `to` == `from`, which
 * copies nothing), or set them to zero. Where `bytes` is 0 the pointers are not read. */
CHUNKKV_API chunkkv_status chunkkv_copy(void* to, const void* from, size_t bytes, void* stream);
CHUNKKV_API chunkkv_status chunkkv_zero(void* to, size_t bytes, void* stream);

/* Tables of constants, made and released outside of the hot path: both allocate or free, synchronise with the device
 * and must not run while a graph is captured. upload writes to *device the address of a copy of `bytes` > 0 bytes of
 * host memory on the current device, aligned to 16 bytes (NULL on failure); whoever uploaded it releases it, once,
 * with the same device current and after the last op that reads it. Releasing NULL does nothing. */
CHUNKKV_API chunkkv_status chunkkv_upload(const void* host, size_t bytes, void** device);
CHUNKKV_API chunkkv_status chunkkv_release(void* device);

#ifdef __cplusplus
}
#endif

#endif
