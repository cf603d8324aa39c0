// The attributes of a plugin ("fields" in TensorRT's words). One table per plugin says which there are; parsing, range
// checks, serialising into an engine and the field names that the ONNX parser asks for all follow from it.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cstdint>
#include <vector>

#include "chunkkv/limits.h"

namespace chunkkv::trt {

constexpr int32_t kMaxFields = 24;        // of one plugin
constexpr int32_t kRequired = INT32_MIN;  // as the default of a field: there is none

/// One attribute of a plugin, of one of three kinds:
///   INT     one number from `low` to `high`; the kind where neither `words` nor `max_values` is set
///   STRING  one word of the list `words`; its value is the word's index there, from `low` to `high`
///   INTS    1 to `max_values` numbers, each from `low` to `high`
/// A node may leave out a field that has a default: an INT or STRING then has the value `by_default`, an INTS is empty.
/// An engine stores every field except empty INTS, so that any other missing field means a damaged engine.
struct Field {
    const char* name;
    int32_t low, high;
    int32_t by_default = kRequired;  // for INTS any other value means: may be left out
    const char* const* words = nullptr;
    int32_t max_values = 0;
};

/// The required field of a ChunkKV setting, with the setting's name and range.
constexpr Field fieldOf(const limits::Setting& setting) {
    return {setting.name, setting.low, setting.high, kRequired, setting.words};
}

/// The same for a setting that nodes may leave out.
constexpr Field fieldOf(const limits::Setting& setting, int32_t by_default) {
    return {setting.name, setting.low, setting.high, by_default, setting.words};
}

struct Table {
    const char* plugin;
    const Field* fields;
    int32_t count;
};

/// The values of a table's fields. Copying them is all that cloning a plugin takes.
class FieldValues {
  public:
    explicit FieldValues(const Table& table) noexcept : table_(&table) {}

    /// Copy the values of `attributes`, which the caller may free afterwards. Returns false and reports the first
    /// attribute that is unknown, given twice, missing, of another type or length, or out of range.
    bool parse(const nvinfer1::PluginFieldCollection* attributes, nvinfer1::TensorRTPhase phase);

    int32_t operator[](int32_t field) const noexcept { return values_[field]; }
    const std::vector<int32_t>& array(int32_t field) const noexcept { return arrays_[field]; }
    const Table& table() const noexcept { return *table_; }

    /// The fields in the form that parse() reads. The result points into this object.
    const nvinfer1::PluginFieldCollection* serialize() noexcept;

  private:
    /// `seen` has one bit per field of the table.
    bool parseOne(const nvinfer1::PluginField& attribute, uint32_t& seen);
    bool parseWord(const Field& field, const nvinfer1::PluginField& attribute, int32_t& value) const noexcept;
    bool parseNumber(const Field& field, const void* data, int32_t& value) const noexcept;
    int32_t find(const char* name) const noexcept;

    const Table* table_;
    std::array<int32_t, kMaxFields> values_{};
    std::array<std::vector<int32_t>, kMaxFields> arrays_{};
    std::array<nvinfer1::PluginField, kMaxFields> fields_{};
    nvinfer1::PluginFieldCollection collection_{};
};

/// The names and types of a table's fields, for the parser of ONNX files.
class FieldNames {
  public:
    explicit FieldNames(const Table& table) noexcept;
    const nvinfer1::PluginFieldCollection* collection() const noexcept { return &collection_; }

  private:
    std::array<nvinfer1::PluginField, kMaxFields> fields_{};
    nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace chunkkv::trt
