// Damaged engines: the deserialiser must refuse or understand them, and never read beside a field's bytes.
#include <algorithm>
#include <cstring>
#include <random>

#include "host.h"

namespace host {
namespace {

/// A field that owns what it says, so that it can be changed.
struct Loose {
    std::string name;
    PluginFieldType type;
    std::vector<char> bytes;
    int32_t length;
    bool has_data = true;
};

bool sameFields(const PluginFieldCollection& a, const PluginFieldCollection& b) {
    if (a.nbFields != b.nbFields) return false;
    for (int32_t i = 0; i < a.nbFields; ++i) {
        const PluginField &x = a.fields[i], &y = b.fields[i];
        const size_t size = x.type == PluginFieldType::kINT32 ? 4 : 1;
        if (std::strcmp(x.name, y.name) != 0 || x.type != y.type || x.length != y.length ||
            std::memcmp(x.data, y.data, size * x.length) != 0)
            return false;
    }
    return true;
}

class Fuzzer {
  public:
    Fuzzer(const PluginFieldCollection& valid, uint32_t seed) : random_(seed) {
        for (int32_t i = 0; i < valid.nbFields; ++i) {
            const PluginField& field = valid.fields[i];
            const char* data = static_cast<const char*>(field.data);
            const int32_t size = field.type == PluginFieldType::kINT32 ? 4 * field.length : field.length;
            valid_.push_back({field.name, field.type, std::vector<char>(data, data + size), field.length});
        }
    }

    /// A copy with one to three changes.
    std::vector<Loose> damaged() {
        std::vector<Loose> fields = valid_;
        for (int32_t changes = 1 + below(3); changes > 0 && !fields.empty(); --changes) change(fields);
        if (below(8) == 0) std::shuffle(fields.begin(), fields.end(), random_);
        return fields;
    }

  private:
    int32_t below(int32_t bound) { return static_cast<int32_t>(random_() % static_cast<uint32_t>(bound)); }

    void change(std::vector<Loose>& fields) {
        const size_t place = below(static_cast<int32_t>(fields.size()));
        Loose& field = fields[place];
        switch (below(8)) {
            case 0:
                fields.erase(fields.begin() + static_cast<int64_t>(place));
                return;
            case 1:
                fields.push_back(field);
                return;
            case 2:
                field.name[below(static_cast<int32_t>(field.name.size()))] ^= static_cast<char>(1 << below(8));
                return;
            case 3:
                field.type = static_cast<PluginFieldType>(below(16) - 1);
                field.bytes.resize(1 << 14);
                return;
            case 4:
                field.length = below(5) - 1;
                break;
            case 5:
                field.has_data = false;
                return;
            case 6:
                field.length += below(40);
                break;
            default:
                if (!field.bytes.empty())
                    field.bytes[below(static_cast<int32_t>(field.bytes.size()))] = static_cast<char>(below(256));
                return;
        }
        const size_t wanted = static_cast<size_t>(std::max(field.length, 0)) * (field.bytes.size() >= 4 ? 4 : 1);
        while (field.bytes.size() < wanted) field.bytes.push_back(static_cast<char>(below(256)));
    }

    std::mt19937 random_;
    std::vector<Loose> valid_;
};

}  // namespace

int32_t fuzz(const Library& library, const std::string& key, const PluginFieldCollection& valid, uint32_t seed,
             int32_t rounds) {
    Fuzzer fuzzer(valid, seed);
    int32_t accepted = 0;
    for (int32_t round = 0; round < rounds; ++round) {
        const std::vector<Loose> damaged = fuzzer.damaged();
        std::vector<PluginField> fields;
        for (const Loose& field : damaged)
            fields.emplace_back(field.name.c_str(), field.has_data ? field.bytes.data() : nullptr, field.type,
                                field.length);
        const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
        const Blob exact(collection);
        const PluginFieldCollection view = exact.view();
        const PluginPointer plugin(library.creator(key).createPlugin("fuzz", &view, TensorRTPhase::kRUNTIME));
        if (!plugin) continue;
        ++accepted;
        const auto stored = [](IPluginV3& from) {
            auto* found = from.getCapabilityInterface(PluginCapabilityType::kRUNTIME);
            return Blob(*static_cast<IPluginV3OneRuntime*>(found)->getFieldsToSerialize());
        };
        const Blob once = stored(*plugin);
        const PluginPointer again = library.create(key, once.view(), TensorRTPhase::kRUNTIME);
        require(sameFields(once.view(), stored(*again).view()), "fields changed on their second way through");
    }
    return accepted;
}

}  // namespace host
