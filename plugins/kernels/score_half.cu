// The passes of score for float16 queries.
#include "score_pass.cuh"

namespace chunkkv {

template struct ScorePasses<__half>;

}  // namespace chunkkv
