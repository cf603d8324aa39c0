#include "fields.h"

#include <algorithm>

#include <cstdio>
#include <cstring>
#include <utility>

#include "log.h"

using namespace nvinfer1;

namespace chunkkv::trt {
namespace {

constexpr int32_t kTextBytes = 256;

PluginFieldType typeOf(const Field& field) { return field.words ? PluginFieldType::kCHAR : PluginFieldType::kINT32; }

bool isLength(const Field& field, int32_t length) {
    return length >= 1 && (field.words || length <= (field.max_values > 0 ? field.max_values : 1));
}

const char* kind(const Field& field) {
    if (field.words) return "a STRING (kCHAR)";
    return field.max_values > 0 ? "INTS (kINT32), at least one and no more than the plugin has room for"
                                : "one INT (kINT32, length 1)";
}

/// "a, b, c" for messages.
template <class NameOf>
const char* listed(char (&text)[kTextBytes], int32_t count, NameOf nameOf) {
    size_t used = 0;
    text[0] = 0;
    for (int32_t i = 0; i < count && used < sizeof(text); ++i)
        used += std::snprintf(text + used, sizeof(text) - used, "%s%s", i ? ", " : "", nameOf(i));
    return text;
}

}  // namespace

int32_t FieldValues::find(const char* name) const noexcept {
    for (int32_t i = 0; name && i < table_->count; ++i)
        if (std::strcmp(table_->fields[i].name, name) == 0) return i;
    return -1;
}

bool FieldValues::parse(const PluginFieldCollection* attributes, TensorRTPhase phase) {
    const Field *begin = table_->fields, *end = begin + table_->count;
    const auto hasDefault = [](const Field& field) { return field.by_default != kRequired; };
    if (!attributes && std::all_of(begin, end, hasDefault)) {
        std::transform(begin, end, values_.begin(), [](const Field& field) { return field.by_default; });
        return true;
    }
    if (!attributes || attributes->nbFields < 0 || (attributes->nbFields > 0 && !attributes->fields))
        return report("%s: no fields are given; create it from a node or an engine", table_->plugin);
    uint32_t seen = 0;
    for (int32_t i = 0; i < attributes->nbFields; ++i)
        if (!parseOne(attributes->fields[i], seen)) return false;
    for (int32_t i = 0; i < table_->count; ++i) {
        if (seen >> i & 1u) continue;
        const Field& field = table_->fields[i];
        if (field.by_default == kRequired || (phase != TensorRTPhase::kBUILD && field.max_values == 0))
            return report("%s: %s is missing; %s", table_->plugin, field.name,
                          phase == TensorRTPhase::kBUILD ? "set it as an attribute of the node"
                                                         : "the engine is damaged, build it again");
        values_[i] = field.by_default;
    }
    return true;
}

bool FieldValues::parseOne(const PluginField& attribute, uint32_t& seen) {
    const int32_t index = find(attribute.name);
    if (index < 0) {
        char names[kTextBytes];
        listed(names, table_->count, [this](int32_t i) { return table_->fields[i].name; });
        return report("%s: unknown field '%.64s'; known are %s", table_->plugin, attribute.name ? attribute.name : "",
                      names);
    }
    const Field& field = table_->fields[index];
    if (seen >> index & 1u) return report("%s: %s is given twice", table_->plugin, field.name);
    seen |= 1u << index;
    if (attribute.type != typeOf(field) || !attribute.data || !isLength(field, attribute.length))
        return report("%s: %s has field type %d and length %d%s; it must be %s", table_->plugin, field.name,
                      static_cast<int>(attribute.type), attribute.length, attribute.data ? "" : " without data",
                      kind(field));
    if (field.words) return parseWord(field, attribute, values_[index]);
    if (field.max_values == 0) return parseNumber(field, attribute.data, values_[index]);
    const char* data = static_cast<const char*>(attribute.data);
    std::vector<int32_t> numbers(attribute.length);
    for (size_t i = 0; i < numbers.size(); ++i)
        if (!parseNumber(field, data + i * sizeof(int32_t), numbers[i])) return false;
    arrays_[index] = std::move(numbers);
    return true;
}

bool FieldValues::parseNumber(const Field& field, const void* data, int32_t& value) const noexcept {
    std::memcpy(&value, data, sizeof(value));  // a serialised field need not be aligned
    if (value >= field.low && value <= field.high) return true;
    return report("%s: %s is %d; allowed is %d to %d", table_->plugin, field.name, value, field.low, field.high);
}

bool FieldValues::parseWord(const Field& field, const PluginField& attribute, int32_t& value) const noexcept {
    const char* text = static_cast<const char*>(attribute.data);
    const size_t length = strnlen(text, static_cast<size_t>(attribute.length));  // with or without the closing NUL
    for (value = field.low; value <= field.high; ++value) {
        const char* word = field.words[value];
        if (std::strlen(word) == length && std::memcmp(word, text, length) == 0) return true;
    }
    char words[kTextBytes];
    listed(words, field.high + 1, [&field](int32_t i) { return field.words[i]; });
    return report("%s: %s is '%.*s'; allowed are %s", table_->plugin, field.name,
                  static_cast<int>(length < 64 ? length : 64), text, words);
}

const PluginFieldCollection* FieldValues::serialize() noexcept {
    int32_t count = 0;
    for (int32_t i = 0; i < table_->count; ++i) {
        const Field& field = table_->fields[i];
        const std::vector<int32_t>& numbers = arrays_[i];
        if (field.max_values > 0 && numbers.empty()) continue;
        PluginField& stored = fields_[count++];
        if (field.words) {
            const char* word = field.words[values_[i]];
            stored = PluginField(field.name, word, typeOf(field), static_cast<int32_t>(std::strlen(word)) + 1);
        } else if (field.max_values > 0) {
            stored = PluginField(field.name, numbers.data(), typeOf(field), static_cast<int32_t>(numbers.size()));
        } else {
            stored = PluginField(field.name, &values_[i], typeOf(field), 1);
        }
    }
    collection_ = PluginFieldCollection{count, fields_.data()};
    return &collection_;
}

FieldNames::FieldNames(const Table& table) noexcept : collection_{table.count, fields_.data()} {
    for (int32_t i = 0; i < table.count; ++i)
        fields_[i] = PluginField(table.fields[i].name, nullptr, typeOf(table.fields[i]), 1);
}

}  // namespace chunkkv::trt
