// layout.h behind C functions, for test_layout.py.
#include "chunkkv/layout.h"

extern "C" int64_t probe_address(const chunkkv_layout* layout, int64_t base, int32_t kv, int32_t row, int32_t head,
                                 int32_t token) {
    const auto rows = chunkkv::tokenRows(*layout, reinterpret_cast<const void*>(base), kv, row, head);
    return reinterpret_cast<int64_t>(rows.at(token));
}

extern "C" int64_t probe_first_entry(const chunkkv_rows* rows, int32_t row, int32_t length, int32_t pitch) {
    return chunkkv::rowPart(*rows, row, length, pitch).first;
}

extern "C" int64_t probe_first_element(int64_t token, int32_t heads, int32_t head, int32_t head_dim) {
    return chunkkv::firstElement(token, heads, head, head_dim);
}

extern "C" int32_t probe_row_kept(const chunkkv_rows* rows, const chunkkv_settings* settings, int32_t row) {
    return chunkkv::rowKept(*rows, *settings, row, chunkkv::rowLength(*rows, row));
}
