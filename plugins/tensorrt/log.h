// Messages of the plugins: to the logger that TensorRT gave this library, or to stderr before it has.
#pragma once

#include <NvInferRuntime.h>

namespace chunkkv::trt {

/// Keep the finder unless there is one already. The registry that loads this library owns it and outlives every plugin.
void keepLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

/// Log an error and return false. Must run on the thread that TensorRT called: findLogger() requires it.
__attribute__((format(printf, 1, 2))) bool report(const char* format, ...) noexcept;

}  // namespace chunkkv::trt
