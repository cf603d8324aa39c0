// The TensorRTs that these plugins fit: which library of a process is one, and which plugin library belongs to it.
#pragma once

namespace chunkkv::trt {

struct Host {
    const char* name;
    const char* library;       // the one that holds builder, runtime and plugin registry
    const char* lean_library;  // a runtime alone, with a registry of its own; nullptr where there is none
    const char* plugins;       // lies beside the loader library
};

inline constexpr Host kTensorRT11{"TensorRT 11", "libnvinfer.so.11", "libnvinfer_lean.so.11",
                                  "libchunkkv_tensorrt.so.11"};
inline constexpr Host kTensorRT10{"TensorRT 10", "libnvinfer.so.10", "libnvinfer_lean.so.10",
                                  "libchunkkv_tensorrt.so.10"};
/// It has version numbers of its own and the layouts of TensorRT 11.
inline constexpr Host kRtx1{"TensorRT for RTX 1", "libtensorrt_rtx.so.1", nullptr, "libchunkkv_tensorrt_rtx.so.1"};

/// The loader prefers them in this order.
inline constexpr Host kHosts[] = {kTensorRT11, kTensorRT10, kRtx1};

}  // namespace chunkkv::trt
