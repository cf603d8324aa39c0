// An NVTX injection library: writes every range call of a process as one JSON line to the file NVTX_RECORDER_OUT.
// Each image of a process (a Python module, a plugin library) initialises NVTX by itself, so every call may come twice.
#include <nvtx3/nvToolsExt.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>

// The header leaves these handle types to the tool.
struct nvtxDomainRegistration_st {
    std::string name;
};
struct nvtxStringRegistration_st {
    std::string text;
};

namespace {

std::mutex output_mutex;
FILE* output = nullptr;
std::atomic<nvtxRangeId_t> next_range{1};
thread_local int depth = 0;  // one count per thread, over all domains

std::string quoted(const std::string& text) {
    std::string found = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') found += '\\';
        found += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
    }
    return found + "\"";
}

std::string attributesText(const nvtxEventAttributes_t* attributes) {
    if (!attributes) return "";
    std::string found;
    if (attributes->messageType == NVTX_MESSAGE_TYPE_ASCII)
        found += ", \"text\": " + quoted(attributes->message.ascii);
    else if (attributes->messageType == NVTX_MESSAGE_TYPE_REGISTERED)
        found += ", \"text\": " + quoted(attributes->message.registered->text) + ", \"registered\": true";
    if (attributes->payloadType == NVTX_PAYLOAD_TYPE_INT64)
        found += ", \"payload\": " + std::to_string(attributes->payload.llValue);
    if (attributes->colorType == NVTX_COLOR_ARGB) found += ", \"colour\": " + std::to_string(attributes->color);
    return found;
}

void write(const char* event, nvtxDomainHandle_t domain, const std::string& rest) {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    const long long t = now.tv_sec * 1000000000LL + now.tv_nsec;
    const std::lock_guard<std::mutex> hold(output_mutex);
    std::fprintf(output, "{\"event\": \"%s\", \"t\": %lld, \"thread\": %d, \"domain\": %s%s}\n", event, t, gettid(),
                 quoted(domain ? domain->name : "").c_str(), rest.c_str());
    std::fflush(output);
}

nvtxDomainHandle_t domainCreate(const char* name) { return new nvtxDomainRegistration_st{name}; }

nvtxStringHandle_t registerString(nvtxDomainHandle_t, const char* text) { return new nvtxStringRegistration_st{text}; }

int rangePush(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* attributes) {
    write("push", domain, ", \"depth\": " + std::to_string(depth) + attributesText(attributes));
    return depth++;
}

int rangePop(nvtxDomainHandle_t domain) {
    if (depth == 0) {
        write("unbalanced pop", domain, "");
        return -1;
    }
    write("pop", domain, ", \"depth\": " + std::to_string(--depth));
    return depth;
}

nvtxRangeId_t rangeStart(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* attributes) {
    const nvtxRangeId_t id = next_range++;
    write("start", domain, ", \"id\": " + std::to_string(id) + attributesText(attributes));
    return id;
}

void rangeEnd(nvtxDomainHandle_t domain, nvtxRangeId_t id) { write("end", domain, ", \"id\": " + std::to_string(id)); }

template <class Function>
void set(NvtxFunctionTable table, unsigned size, unsigned index, Function function) {
    if (index < size && table[index]) *table[index] = reinterpret_cast<NvtxFunctionPointer>(function);
}

bool openOutput() {
    const std::lock_guard<std::mutex> hold(output_mutex);
    const char* path = std::getenv("NVTX_RECORDER_OUT");
    if (!output && path) output = std::fopen(path, "a");
    return output != nullptr;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t tables) {
    const auto* callbacks = static_cast<const NvtxExportTableCallbacks*>(tables(NVTX_ETID_CALLBACKS));
    if (!callbacks || callbacks->struct_size < sizeof(*callbacks) || !openOutput()) return 0;
    NvtxFunctionTable table = nullptr;
    unsigned size = 0;
    if (!callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size)) return 0;
    set(table, size, NVTX_CBID_CORE2_DomainCreateA, domainCreate);
    set(table, size, NVTX_CBID_CORE2_DomainRegisterStringA, registerString);
    set(table, size, NVTX_CBID_CORE2_DomainRangePushEx, rangePush);
    set(table, size, NVTX_CBID_CORE2_DomainRangePop, rangePop);
    set(table, size, NVTX_CBID_CORE2_DomainRangeStartEx, rangeStart);
    set(table, size, NVTX_CBID_CORE2_DomainRangeEnd, rangeEnd);
    return 1;
}
