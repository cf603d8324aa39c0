// The passes of score for bfloat16 queries.
#include "score_pass.cuh"

namespace chunkkv {

template struct ScorePasses<__nv_bfloat16>;

}  // namespace chunkkv
