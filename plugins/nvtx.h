/// A range of an NVTX tool's timeline around one op; nothing where the CUDA toolkit's nvtx3 headers are not found.
#pragma once

#include <cstdint>

#include "chunkkv/budget.h"

#if __has_include(<nvtx3/nvtx3.hpp>)
#include <nvtx3/nvtx3.hpp>

namespace chunkkv {

struct NvtxDomain {
    static constexpr char const* name{"chunkkv"};  // as python/chunkkv/profiling.py: a tool shows both as one
};

class StageRange {
  public:
    /// `kept_tokens` is the payload: the most that all rows together may keep, 0 where the op does not know.
    StageRange(const char* stage, int64_t kept_tokens) : range_{stage, nvtx3::payload{kept_tokens}} {}

  private:
    nvtx3::scoped_range_in<NvtxDomain> range_;
};

}  // namespace chunkkv

#else

namespace chunkkv {

struct StageRange {
    StageRange(const char*, int64_t) {}
};

}  // namespace chunkkv

#endif

namespace chunkkv {

/// The most that the rows keep by the settings' own budget.
inline int64_t mostKept(const Rows& rows, const Settings& settings) {
    return int64_t{rows.batch} *
           keptTokens(settings, rows.max_length, settings.keep_per_10k, settings.budget_tokens);
}

}  // namespace chunkkv
