// Messages of the plugins: to the logger that TensorRT gave this library, or to stderr before it has.
#pragma once

#include <NvInferRuntime.h>

namespace chunkkv::trt {

/// Keep the first finder: the registry that loads this library owns it and outlives every plugin.
void keepLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

/// Log an error on the calling thread, as findLogger() demands; always returns false.
__attribute__((format(printf, 1, 2))) bool report(const char* format, ...) noexcept;

}  // namespace chunkkv::trt
