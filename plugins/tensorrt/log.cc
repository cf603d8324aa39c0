#include "log.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>

namespace chunkkv::trt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

nvinfer1::ILogger* currentLogger() noexcept {
    nvinfer1::ILoggerFinder* finder = logger_finder.load();
    try {
        return finder ? finder->findLogger() : nullptr;
    } catch (...) {  // findLogger, unlike log, may throw
        return nullptr;
    }
}

}  // namespace

void keepLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept {
    nvinfer1::ILoggerFinder* none = nullptr;
    logger_finder.compare_exchange_strong(none, finder);
}

bool report(const char* format, ...) noexcept {
    char text[768];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    for (char* c = text; *c; ++c)
        if (*c < ' ' || *c > '~') *c = '?';  // names and words may come from a damaged file
    if (nvinfer1::ILogger* logger = currentLogger())
        logger->log(nvinfer1::ILogger::Severity::kERROR, text);
    else
        std::fprintf(stderr, "%s\n", text);
    return false;
}

}  // namespace chunkkv::trt
