// What this library exports: the two functions by which TensorRT's registry loads it, and one for the loader library.
#include <dlfcn.h>

#include <cstdio>
#include <string>

#include "chunkkv/chunkkv.h"
#include "plugin_base.h"

using namespace nvinfer1;

#define CHUNKKV_EXPORT extern "C" __attribute__((visibility("default")))

namespace chunkkv::trt {
namespace {

bool isLoaded(int major) {
    const std::string name = "libnvinfer.so." + std::to_string(major);
    void* library = dlopen(name.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (library) dlclose(library);
    return library != nullptr;
}

/// False where the process runs another TensorRT than this library is made for: loggers and registries are laid out
/// differently from 10 to 11, so using either would crash.
bool isRightMajor() noexcept {
    constexpr int kOwn = NV_TENSORRT_MAJOR;
    constexpr int kOther = kOwn == 10 ? 11 : 10;
    return guarded("getCreators", false, [] {
        if (isLoaded(kOwn) || !isLoaded(kOther)) return true;
        std::fprintf(stderr,
                     "chunkkv: these plugins are made for TensorRT %d, but %d is loaded; "
                     "load libchunkkv_tensorrt.so.%d\n",
                     kOwn, kOther, kOther);
        return false;
    });
}

}  // namespace
}  // namespace chunkkv::trt

using namespace chunkkv::trt;

CHUNKKV_EXPORT IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static IPluginCreatorInterface* const creators[] = {selectCreator(), compactCreator(), prepareCreator(),
                                                        ropeCreator(),   scoreCreator(),   compressCreator()};
    count = 0;
    if (!isRightMajor()) return nullptr;
    if (chunkkv_abi_version() != CHUNKKV_ABI_VERSION) {
        report("chunkkv: libchunkkv.so has C ABI version %d, the plugins need %d; install both from one build",
               chunkkv_abi_version(), CHUNKKV_ABI_VERSION);
        return nullptr;
    }
    count = sizeof(creators) / sizeof(creators[0]);
    return creators;
}

CHUNKKV_EXPORT void setLoggerFinder(ILoggerFinder* finder) {
    if (isRightMajor()) keepLoggerFinder(finder);
}

/// Register every creator with an IPluginRegistry of this library's TensorRT; returns how many were new.
CHUNKKV_EXPORT int32_t chunkkv_register_creators(void* registry) {
    int32_t count = 0, added = 0;
    IPluginCreatorInterface* const* creators = getCreators(count);
    for (int32_t i = 0; i < count; ++i)
        added += static_cast<IPluginRegistry*>(registry)->registerCreator(*creators[i], kNamespace) ? 1 : 0;
    return added;
}
