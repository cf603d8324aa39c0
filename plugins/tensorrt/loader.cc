// libchunkkv_tensorrt_loader.so: registers the plugins as soon as it is loaded, for hosts that only dlopen a plugin
// library (tritonserver's plugins=) or preload it. It picks the plugin library that fits the TensorRT of the process
// and looks for it beside itself. It must not be used together with IPluginRegistry::loadLibrary.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <string>

#include "hosts.h"

namespace {

using chunkkv::trt::Host;
using chunkkv::trt::kHosts;

/// The folder of this library, with a slash at its end.
std::string ownFolder() {
    Dl_info info{};
    if (!dladdr(reinterpret_cast<const void*>(&ownFolder), &info) || !info.dli_fname) return "";
    const std::string path = info.dli_fname;
    return path.substr(0, path.rfind('/') + 1);
}

void registerWith(void* tensorrt, const Host& host) {
    using GetRegistry = void* (*)();
    using Register = int32_t (*)(void*);
    const auto get_registry = reinterpret_cast<GetRegistry>(dlsym(tensorrt, "getPluginRegistry"));
    void* registry = get_registry ? get_registry() : nullptr;
    const std::string path = ownFolder() + host.plugins;
    void* plugins = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);  // stays loaded: the registry points into it
    const auto add = plugins ? reinterpret_cast<Register>(dlsym(plugins, "chunkkv_register_creators")) : nullptr;
    if (!add) {
        const char* error = dlerror();
        std::fprintf(stderr, "chunkkv: cannot load %s: %s\n", path.c_str(), error ? error : "no plugins in it");
    } else if (!registry || add(registry) == 0) {
        std::fprintf(stderr, "chunkkv: %s has taken no plugin; are they registered already?\n", host.name);
    }
}

/// Register with the first of kHosts that is loaded (RTLD_NOLOAD) or can be loaded (0); return whether there is one.
bool registerWhere(int flags) {
    for (const Host& host : kHosts) {
        if (void* tensorrt = dlopen(host.library, RTLD_LAZY | flags)) {
            registerWith(tensorrt, host);
            return true;
        }
    }
    return false;
}

__attribute__((constructor)) void registerPlugins() {
    // Under LD_PRELOAD this runs before TensorRT is loaded. Then it is loaded here, and the host gets the same copy.
    if (registerWhere(RTLD_NOLOAD) || registerWhere(0)) return;
    std::string names;
    for (const Host& host : kHosts) names += std::string(names.empty() ? "" : ", ") + host.library;
    std::fprintf(stderr, "chunkkv: none of %s was found, so no plugin is registered\n", names.c_str());
}

}  // namespace
