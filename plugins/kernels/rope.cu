// rope: rotate Q and K of packed QKV by logical positions. One block per token.
//
// A thread owns 2*kVector elements of a head, the same ones in every head it visits, so its cosines and sines are read
// once. Both styles pair elements that one thread holds:
//   neox   [ i.. )  with  [ rotary_dim/2 + i.. )        gptj   even with odd, inside [ 2i.. )
// It reads its two vectors before it writes them, and no other thread touches them: in place is safe.
#include "chunkkv/layout.h"
#include "launch.cuh"

namespace chunkkv {
namespace {

constexpr int kThreads = 128;

template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Vector {
    T at[kCount];
};

template <class T, int kVector, bool kNeox>
__global__ void ropeKernel(const __grid_constant__ RopeParams params) {
    using Elements = Vector<T, kVector>;
    using CosSin = Vector<float, 2 * kVector>;
    const int64_t token = blockIdx.x;
    const int32_t half = params.rotary_dim / 2;
    const int32_t items = params.head_dim / (2 * kVector);  // threads that share a head
    const int32_t item = threadIdx.x % items;
    const int32_t heads_per_pass = kThreads / items;
    const bool rotates = item < half / kVector;
    const bool split = kNeox && rotates;
    const int32_t first = split ? item * kVector : 2 * item * kVector;
    const int32_t second = first + (split ? half : kVector);

    const int32_t given = params.positions[token];
    const int32_t last = params.max_positions - 1;
    const int64_t position = given < 0 ? 0 : given > last ? last : given;
    CosSin angle{};
    if (rotates) angle = *reinterpret_cast<const CosSin*>(params.cos_sin + (position * half + item * kVector) * 2);

    const int32_t rotated_heads = params.heads + params.kv_heads;
    const int32_t all_heads = rotated_heads + params.kv_heads;
    const bool in_place = params.qkv == params.qkv_out;
    if (static_cast<int32_t>(threadIdx.x) / items >= heads_per_pass) return;
    for (int32_t head = threadIdx.x / items; head < all_heads; head += heads_per_pass) {
        const bool copies = !rotates || head >= rotated_heads;
        if (copies && in_place) continue;
        const int64_t offset = firstElement(token, all_heads, head, params.head_dim);
        const T* from = static_cast<const T*>(params.qkv) + offset;
        T* to = static_cast<T*>(params.qkv_out) + offset;
        Elements pair[2];
        pair[0] = *reinterpret_cast<const Elements*>(from + first);
        pair[1] = *reinterpret_cast<const Elements*>(from + second);
        if (!copies) {
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
                T& x = kNeox ? pair[0].at[i] : pair[2 * i / kVector].at[2 * i % kVector];
                T& y = kNeox ? pair[1].at[i] : pair[(2 * i + 1) / kVector].at[(2 * i + 1) % kVector];
                const float cosine = angle.at[2 * i], sine = angle.at[2 * i + 1];
                const float real = toFloat(x), imaginary = toFloat(y);
                x = fromFloat<T>(real * cosine - imaginary * sine);
                y = fromFloat<T>(imaginary * cosine + real * sine);
            }
        }
        *reinterpret_cast<Elements*>(to + first) = pair[0];
        *reinterpret_cast<Elements*>(to + second) = pair[1];
    }
}

template <class T, int kVector>
LaunchStatus launchWith(const RopeParams& params, void* stream) {
    const dim3 grid(static_cast<unsigned>(params.num_tokens));
    const bool neox = params.style == CHUNKKV_ROPE_NEOX;
    const auto kernel = neox ? ropeKernel<T, kVector, true> : ropeKernel<T, kVector, false>;
    return launch(kernel, grid, dim3(kThreads), 0, stream, params);
}

template <class T>
LaunchStatus launchFor(const RopeParams& params, void* stream) {
    constexpr int kVector = 16 / sizeof(T);
    const auto bits = reinterpret_cast<uintptr_t>(params.qkv) | reinterpret_cast<uintptr_t>(params.qkv_out) |
                      reinterpret_cast<uintptr_t>(params.cos_sin);
    const bool fits = params.head_dim % (2 * kVector) == 0 && params.rotary_dim % (2 * kVector) == 0;
    return bits % 16 == 0 && fits ? launchWith<T, kVector>(params, stream) : launchWith<T, 1>(params, stream);
}

}  // namespace

LaunchStatus launchRope(const RopeParams& params, void* stream) {
    if (params.dtype == CHUNKKV_FLOAT32) return launchFor<float>(params, stream);
    if (params.dtype == CHUNKKV_FLOAT16) return launchFor<__half>(params, stream);
    return launchFor<__nv_bfloat16>(params, stream);
}

}  // namespace chunkkv
