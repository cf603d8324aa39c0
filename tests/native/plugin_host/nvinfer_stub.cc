// A libnvinfer for tests of loading: a plugin registry that remembers what was registered, and whether it was ready.
#include <NvInferRuntime.h>

#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

bool constructed = false;
__attribute__((constructor)) void construct() { constructed = true; }

class Registry : public IPluginRegistry {
  public:
    bool registerCreator(IPluginCreatorInterface& creator, const AsciiChar* name_space) noexcept override {
        const auto& v3 = static_cast<IPluginCreatorV3One&>(creator);
        const std::string name = std::string(name_space) + "::" + v3.getPluginName() + ":" + v3.getPluginVersion();
        if (!constructed || names.find(name) != std::string::npos) return false;
        names += name + "\n";
        return true;
    }
#if NV_TENSORRT_MAJOR < 11
    bool registerCreator(IPluginCreator&, const AsciiChar*) noexcept override { return false; }
    IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override { return nullptr; }
    IPluginCreator* getPluginCreator(const AsciiChar*, const AsciiChar*, const AsciiChar*) noexcept override {
        return nullptr;
    }
    bool deregisterCreator(const IPluginCreator&) noexcept override { return false; }
#endif
    void setErrorRecorder(IErrorRecorder*) noexcept override {}
    IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
    bool isParentSearchEnabled() const override { return false; }
    void setParentSearchEnabled(bool) override {}
    PluginLibraryHandle loadLibrary(const AsciiChar*) noexcept override { return nullptr; }
    void deregisterLibrary(PluginLibraryHandle) noexcept override {}
    IPluginCreatorInterface* const* getAllCreators(int32_t*) const noexcept override { return nullptr; }
    IPluginCreatorInterface* getCreator(const AsciiChar*, const AsciiChar*, const AsciiChar*) noexcept override {
        return nullptr;
    }
    bool deregisterCreator(const IPluginCreatorInterface&) noexcept override { return false; }
    IPluginResource* acquirePluginResource(const AsciiChar*, IPluginResource*) noexcept override { return nullptr; }
    int32_t releasePluginResource(const AsciiChar*) noexcept override { return 0; }
    IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t*) noexcept override { return nullptr; }

    std::string names;
};

Registry registry;

}  // namespace

extern "C" __attribute__((visibility("default"))) IPluginRegistry* getPluginRegistry() noexcept { return &registry; }
extern "C" __attribute__((visibility("default"))) const char* stub_registered() { return registry.names.c_str(); }
