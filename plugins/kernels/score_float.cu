// The passes of score for float32 queries.
#include "score_pass.cuh"

namespace chunkkv {

template struct ScorePasses<float>;

}  // namespace chunkkv
