// Prints every constant of the plugin interface, compiled once per set of headers; equal output means equal layouts.
// With -fdump-lang-class the compiler also writes the vtables of the classes below.
#include <NvInferRuntime.h>

#include <cstddef>
#include <cstdio>

using namespace nvinfer1;

struct Plugin : IPluginV3, IPluginV3OneCore, IPluginV3OneBuild, IPluginV3OneRuntime {};
struct Creator : IPluginCreatorV3One {};
struct Registry : IPluginRegistry {};
struct Context : IPluginResourceContext {};
struct Logger : ILogger {};
struct Finder : ILoggerFinder {};
struct Expression : IDimensionExpr, apiv::VDimensionExpr {};
struct Builder : IExprBuilder, apiv::VExprBuilder {};

#define PRINT(value) std::printf("%s %lld\n", #value, static_cast<long long>(value))
#define SIZE(type) std::printf("sizeof %s %zu %zu\n", #type, sizeof(type), alignof(type))
#define AT(type, member) std::printf("offset %s.%s %zu\n", #type, #member, offsetof(type, member))

int main() {
    PRINT(DataType::kFLOAT), PRINT(DataType::kHALF), PRINT(DataType::kINT8), PRINT(DataType::kINT32);
    PRINT(DataType::kBOOL), PRINT(DataType::kUINT8), PRINT(DataType::kFP8), PRINT(DataType::kBF16);
    PRINT(DataType::kINT64), PRINT(DataType::kINT4);
    PRINT(TensorFormat::kLINEAR), PRINT(TensorFormat::kCHW2), PRINT(TensorFormat::kHWC8), PRINT(TensorFormat::kCHW4);
    PRINT(TensorFormat::kCHW16), PRINT(TensorFormat::kCHW32);
    PRINT(PluginFieldType::kFLOAT16), PRINT(PluginFieldType::kFLOAT32), PRINT(PluginFieldType::kFLOAT64);
    PRINT(PluginFieldType::kINT8), PRINT(PluginFieldType::kINT16), PRINT(PluginFieldType::kINT32);
    PRINT(PluginFieldType::kCHAR), PRINT(PluginFieldType::kDIMS), PRINT(PluginFieldType::kUNKNOWN);
    PRINT(PluginFieldType::kBF16), PRINT(PluginFieldType::kINT64), PRINT(PluginFieldType::kFP8);
    PRINT(PluginFieldType::kINT4);
    PRINT(TensorRTPhase::kBUILD), PRINT(TensorRTPhase::kRUNTIME);
    PRINT(PluginCapabilityType::kCORE), PRINT(PluginCapabilityType::kBUILD), PRINT(PluginCapabilityType::kRUNTIME);
    PRINT(APILanguage::kCPP), PRINT(APILanguage::kPYTHON);
    PRINT(DimensionOperation::kSUM), PRINT(DimensionOperation::kPROD), PRINT(DimensionOperation::kMAX);
    PRINT(DimensionOperation::kMIN), PRINT(DimensionOperation::kSUB), PRINT(DimensionOperation::kEQUAL);
    PRINT(DimensionOperation::kLESS), PRINT(DimensionOperation::kFLOOR_DIV), PRINT(DimensionOperation::kCEIL_DIV);
    PRINT(ILogger::Severity::kINTERNAL_ERROR), PRINT(ILogger::Severity::kERROR), PRINT(ILogger::Severity::kWARNING);
    PRINT(ILogger::Severity::kINFO), PRINT(ILogger::Severity::kVERBOSE);
    PRINT(Dims::MAX_DIMS), PRINT(IPluginV3OneBuild::kDEFAULT_FORMAT_COMBINATION_LIMIT);
    SIZE(Dims), SIZE(InterfaceInfo), SIZE(PluginField), SIZE(PluginFieldCollection), SIZE(PluginTensorDesc);
    SIZE(DynamicPluginTensorDesc), SIZE(DimsExprs), SIZE(Plugin), SIZE(Creator), SIZE(Registry), SIZE(Expression);
    SIZE(Builder), SIZE(Logger), SIZE(Finder), SIZE(Context);
    AT(Dims, d), AT(InterfaceInfo, major), AT(InterfaceInfo, minor), AT(PluginField, data), AT(PluginField, type);
    AT(PluginField, length), AT(PluginFieldCollection, fields), AT(PluginTensorDesc, type);
    AT(PluginTensorDesc, format), AT(PluginTensorDesc, scale), AT(DynamicPluginTensorDesc, min);
    AT(DynamicPluginTensorDesc, max), AT(DynamicPluginTensorDesc, opt), AT(DimsExprs, d);
}
