// What this library exports: the two functions by which TensorRT's registry loads it, one for the loader library, and
// one for a TensorRT-LLM that gives blocks back (docker/tensorrt_llm_patch).
#include <dlfcn.h>

#include <cstdio>

#include "chunkkv/chunkkv.h"
#include "hosts.h"
#include "plugin_base.h"

// 1 where this library is for TensorRT for RTX; NV_TENSORRT_MAJOR then still says which layouts are meant.
#ifndef CHUNKKV_TENSORRT_RTX
#define CHUNKKV_TENSORRT_RTX 0
#endif

using namespace nvinfer1;

#define CHUNKKV_EXPORT extern "C" __attribute__((visibility("default")))

namespace chunkkv::trt {
namespace {

constexpr const Host& kOwn = CHUNKKV_TENSORRT_RTX ? kRtx1 : NV_TENSORRT_MAJOR == 10 ? kTensorRT10 : kTensorRT11;

bool isLoaded(const char* library) {
    void* handle = library ? dlopen(library, RTLD_LAZY | RTLD_NOLOAD) : nullptr;
    if (handle) dlclose(handle);
    return handle != nullptr;
}

bool isLoaded(const Host& host) { return isLoaded(host.library) || isLoaded(host.lean_library); }

/// False where the process runs another TensorRT than this library is made for: loggers and registries are laid out
/// differently from 10 to 11, so using either would crash.
bool isRightHost() noexcept {
    return guarded("getCreators", false, [] {
        if (isLoaded(kOwn)) return true;
        for (const Host& other : kHosts) {
            if (!isLoaded(other)) continue;
            std::fprintf(stderr, "chunkkv: these plugins are made for %s, but %s is loaded; load %s\n", kOwn.name,
                         other.name, other.plugins);
            return false;
        }
        return true;
    });
}

}  // namespace
}  // namespace chunkkv::trt

using namespace chunkkv::trt;

CHUNKKV_EXPORT IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static IPluginCreatorInterface* const creators[] = {selectCreator(), compactCreator(), prepareCreator(),
                                                        ropeCreator(),   scoreCreator(),   compressCreator()};
    count = 0;
    if (!isRightHost()) return nullptr;
    if (chunkkv_abi_version() != CHUNKKV_ABI_VERSION) {
        report("chunkkv: libchunkkv.so has C ABI version %d, the plugins need %d; install both from one build",
               chunkkv_abi_version(), CHUNKKV_ABI_VERSION);
        return nullptr;
    }
    count = sizeof(creators) / sizeof(creators[0]);
    return creators;
}

CHUNKKV_EXPORT void setLoggerFinder(ILoggerFinder* finder) {
    if (isRightHost()) keepLoggerFinder(finder);
}

/// Register every creator with an IPluginRegistry of this library's TensorRT; returns how many were new.
CHUNKKV_EXPORT int32_t chunkkv_register_creators(void* registry) {
    int32_t count = 0, added = 0;
    IPluginCreatorInterface* const* creators = getCreators(count);
    for (int32_t i = 0; i < count; ++i)
        added += static_cast<IPluginRegistry*>(registry)->registerCreator(*creators[i], kNamespace) ? 1 : 0;
    return added;
}

/// How many tokens the engine that this thread ran last keeps of a prompt of `length` tokens; -1 if it has run none.
/// By thread, because a process may serve other engines, whose caches stay whole; every executor has a thread.
CHUNKKV_EXPORT int64_t chunkkv_last_kept_tokens(int64_t length) { return lastKeptTokens(length); }
