// The plugin host for ctypes. Functions return NULL or -1 on failure and leave the failed step in host_error().
#include <cstring>

#include "host.h"

#define HOST_API extern "C" __attribute__((visibility("default")))

using namespace host;

namespace {

thread_local std::string last_error, last_text;

template <class Result, class Body>
Result caught(Result failure, Body body) {
    try {
        return body();
    } catch (const std::exception& error) {
        last_error = error.what();
        return failure;
    }
}

}  // namespace

HOST_API const char* host_error() { return last_error.c_str(); }

HOST_API int32_t host_tensorrt_major() { return NV_TENSORRT_MAJOR; }

/// Lives until the process ends, as TensorRT's registry does.
HOST_API Library* host_open(const char* path) {
    return caught<Library*>(nullptr, [&] { return new Library(path); });
}

HOST_API const char* host_take_log(Library* library) { return (last_text = library->takeLog()).c_str(); }

/// One line per creator: its key, then name:type of every field.
HOST_API const char* host_creators(Library* library) {
    last_text.clear();
    for (const auto& [key, creator] : library->creators()) {
        last_text += key;
        const PluginFieldCollection* names = creator->getFieldNames();
        for (int32_t i = 0; i < names->nbFields; ++i)
            last_text += std::string(" ") + names->fields[i].name + ":" +
                         std::to_string(static_cast<int>(names->fields[i].type));
        last_text += "\n";
    }
    return last_text.c_str();
}

HOST_API Built* host_build(Library* library, const char* key, const PluginFieldCollection* fields, const Tensor* inputs,
                           int32_t count) {
    return caught<Built*>(
        nullptr, [&] { return new Built(*library, key, *fields, std::vector<Tensor>(inputs, inputs + count)); });
}

/// createPlugin without a collection of fields, in the build and in the runtime phase.
HOST_API int32_t host_create_bare(Library* library, const char* key) {
    return caught(-1, [&] {
        for (const TensorRTPhase phase : {TensorRTPhase::kBUILD, TensorRTPhase::kRUNTIME}) {
            const PluginPointer plugin(library->creator(key).createPlugin("node", nullptr, phase));
            require(plugin != nullptr, "createPlugin returned nullptr");
        }
        return 0;
    });
}

HOST_API void host_built_free(Built* built) { delete built; }
HOST_API size_t host_built_workspace(const Built* built) { return built->workspace(); }
HOST_API int32_t host_built_outputs(const Built* built) { return static_cast<int32_t>(built->outputTypes().size()); }

/// The engine's fields; they live as long as `built`.
HOST_API void host_built_fields(const Built* built, PluginFieldCollection* fields) { *fields = built->blob().view(); }

/// Fill in type and dims of every output for these inputs.
HOST_API int32_t host_built_shapes(const Built* built, const Buffer* inputs, int32_t count, Buffer* outputs) {
    return caught(-1, [&] {
        Sizes sizes(count);
        for (int32_t i = 0; i < count; ++i) std::memcpy(sizes[i].d, inputs[i].dims, sizeof(sizes[i].d));
        for (size_t i = 0; i < built->outputTypes().size(); ++i) {
            const Dims dims = built->outputDims(static_cast<int32_t>(i), sizes);
            outputs[i].type = static_cast<int32_t>(built->outputTypes()[i]);
            outputs[i].rank = dims.nbDims;
            std::memcpy(outputs[i].dims, dims.d, sizeof(dims.d));
        }
        return 0;
    });
}

HOST_API Engine* host_deserialise(Library* library, const char* key, const PluginFieldCollection* stored) {
    return caught<Engine*>(nullptr, [&] { return new Engine(*library, key, *stored); });
}

HOST_API void host_engine_free(Engine* engine) { delete engine; }

/// The engine must outlive what is returned.
HOST_API Running* host_attach(const Engine* engine) {
    return caught<Running*>(nullptr, [&] { return new Running(*engine); });
}

HOST_API void host_running_free(Running* running) { delete running; }

HOST_API int32_t host_run(Running* running, const Buffer* inputs, int32_t nb_inputs, const Buffer* outputs,
                          int32_t nb_outputs, void* workspace, void* stream) {
    return caught(-1, [&] {
        running->run(std::vector<Buffer>(inputs, inputs + nb_inputs),
                     std::vector<Buffer>(outputs, outputs + nb_outputs), workspace, stream);
        return 0;
    });
}

HOST_API int32_t host_fuzz(Library* library, const char* key, const PluginFieldCollection* valid, uint32_t seed,
                           int32_t rounds) {
    return caught(-1, [&] { return fuzz(*library, key, *valid, seed, rounds); });
}
