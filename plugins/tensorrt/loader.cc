// libchunkkv_tensorrt_loader.so: registers the plugins as soon as it is loaded, for hosts that only dlopen a plugin
// library (tritonserver's plugins=) or preload it. It picks the plugin library that fits the TensorRT of the process
// and looks for it beside itself. It must not be used together with IPluginRegistry::loadLibrary.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <string>

namespace {

constexpr int kMajors[] = {11, 10};  // newest first

/// The folder of this library, with a slash at its end.
std::string ownFolder() {
    Dl_info info{};
    if (!dladdr(reinterpret_cast<const void*>(&ownFolder), &info) || !info.dli_fname) return "";
    const std::string path = info.dli_fname;
    return path.substr(0, path.rfind('/') + 1);
}

void registerWith(void* tensorrt, int major) {
    using GetRegistry = void* (*)();
    using Register = int32_t (*)(void*);
    const auto get_registry = reinterpret_cast<GetRegistry>(dlsym(tensorrt, "getPluginRegistry"));
    void* registry = get_registry ? get_registry() : nullptr;
    const std::string path = ownFolder() + "libchunkkv_tensorrt.so." + std::to_string(major);
    void* plugins = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);  // stays loaded: the registry points into it
    const auto add = plugins ? reinterpret_cast<Register>(dlsym(plugins, "chunkkv_register_creators")) : nullptr;
    if (!add) {
        const char* error = dlerror();
        std::fprintf(stderr, "chunkkv: cannot load %s: %s\n", path.c_str(), error ? error : "no plugins in it");
    } else if (!registry || add(registry) == 0) {
        std::fprintf(stderr, "chunkkv: TensorRT %d has taken no plugin; are they registered already?\n", major);
    }
}

/// Register with the newest major that is loaded (RTLD_NOLOAD), or that can be loaded (0); return whether there is one.
bool registerWhere(int flags) {
    for (const int major : kMajors) {
        const std::string name = "libnvinfer.so." + std::to_string(major);
        if (void* tensorrt = dlopen(name.c_str(), RTLD_LAZY | flags)) {
            registerWith(tensorrt, major);
            return true;
        }
    }
    return false;
}

__attribute__((constructor)) void registerPlugins() {
    // Under LD_PRELOAD this runs before TensorRT is loaded. Then it is loaded here, and the host gets the same copy.
    if (registerWhere(RTLD_NOLOAD) || registerWhere(0)) return;
    std::fprintf(stderr, "chunkkv: no libnvinfer.so.11 or libnvinfer.so.10 was found, so no plugin is registered\n");
}

}  // namespace
