// Loads plugin libraries into the registry of a real TensorRT, and tells what it then holds. It is compiled against the
// project's own declarations, so it also shows that they fit that registry.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <string>

using namespace nvinfer1;

namespace {

IPluginRegistry* registryOf(const char* tensorrt) {
    void* library = dlopen(tensorrt, RTLD_NOW | RTLD_GLOBAL);
    const auto get = library ? reinterpret_cast<IPluginRegistry* (*)()>(dlsym(library, "getPluginRegistry")) : nullptr;
    return get ? get() : nullptr;
}

/// "namespace::name:version field:type ..." for each creator of `name_space`; the version has "(lost)" behind it where
/// getCreator does not return that creator.
std::string creators(IPluginRegistry& registry, const std::string& name_space) {
    std::string text;
    int32_t count = 0;
    IPluginCreatorInterface* const* all = registry.getAllCreators(&count);
    for (int32_t i = 0; i < count; ++i) {
        const InterfaceInfo info = all[i]->getInterfaceInfo();
        if (std::string(info.kind) != "PLUGIN CREATOR_V3ONE") continue;
        auto& creator = static_cast<IPluginCreatorV3One&>(*all[i]);
        if (creator.getPluginNamespace() != name_space) continue;
        const char* name = creator.getPluginName();
        const char* version = creator.getPluginVersion();
        text += name_space + "::" + name + ":" + version;
        if (registry.getCreator(name, version, name_space.c_str()) != all[i]) text += "(lost)";
        const PluginFieldCollection* fields = creator.getFieldNames();
        for (int32_t f = 0; f < fields->nbFields; ++f)
            text += std::string(" ") + fields->fields[f].name + ":" + std::to_string(int(fields->fields[f].type));
        text += "\n";
    }
    return text;
}

/// What the loader library does: returns how many creators were new to the registry.
int32_t registerCreators(IPluginRegistry& registry, const char* plugins) {
    void* library = dlopen(plugins, RTLD_NOW | RTLD_LOCAL);
    const auto add =
        library ? reinterpret_cast<int32_t (*)(void*)>(dlsym(library, "chunkkv_register_creators")) : nullptr;
    return add ? add(&registry) : -1;
}

}  // namespace

/// Load `plugins` twice, unload it, and register its creators twice. Returns what the registry held before and after
/// each step, each list with a line of dashes behind it; then how many creators were new, each time.
extern "C" __attribute__((visibility("default"))) const char* probe(const char* tensorrt, const char* plugins) {
    static std::string text;
    IPluginRegistry* registry = registryOf(tensorrt);
    if (!registry) return "no registry";
    const auto tell = [&] { text += creators(*registry, "chunkkv") + "--\n"; };
    tell();
    IPluginRegistry::PluginLibraryHandle first = registry->loadLibrary(plugins);
    tell();
    IPluginRegistry::PluginLibraryHandle second = registry->loadLibrary(plugins);
    tell();
    if (second && second != first) registry->deregisterLibrary(second);
    if (first) registry->deregisterLibrary(first);
    tell();
    const int32_t added = registerCreators(*registry, plugins);
    tell();
    text += std::to_string(added) + " " + std::to_string(registerCreators(*registry, plugins));
    return text.c_str();
}
