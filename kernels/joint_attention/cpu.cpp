// Attention over all tokens in bfloat16 for CPUs with AVX512-BF16, after FlashAttention (arXiv 2205.14135).
//
// A block of queries meets blocks of keys in turn; scores, their running maximum and sum, and the result so far
// stay in float32 and in the cache. Both products are oneDNN's micro-kernels, which PyTorch exports.

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>

using at::BFloat16;
using at::native::cpublas::brgemm;

namespace {

constexpr int64_t kQueries = 64;  // rows of scores at a time: with kKeys, 128 KiB of float32
constexpr int64_t kKeys = 512;

struct View {  // of a tensor [B, H, S, D] whose last axis is dense; strides in elements
    BFloat16* data;
    int64_t batch, head, token;
    BFloat16* at(int64_t b, int64_t h, int64_t s) const { return data + b * batch + h * head + s * token; }
};

template <typename T>
std::unique_ptr<T[], decltype(&std::free)> aligned(int64_t count) {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    return {static_cast<T*>(std::aligned_alloc(64, bytes)), &std::free};
}

// 2^x for x <= 0. NaN stays NaN. The polynomial is 2^f on [-1/2, 1/2], relative error below 3e-7.
inline float exp2_of(float x) {
    x = x < -126.f ? -126.f : x;
    const float whole = std::nearbyint(x);
    const float f = x - whole;
    float p = 1.5403530e-4f;
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.f;
    const int32_t exponent = static_cast<int32_t>(whole) + 127;
    return p * std::bit_cast<float>(exponent << 23);
}

// Nearest bfloat16, ties to even. A NaN made of low bits only would round to infinity; the sum of its row,
// which is kept in float32, is NaN all the same, and so is what is divided by it.
inline uint16_t rounded(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Pairs of neighbouring rows interleaved, as the micro-kernels want their second factor.
void pack_keys(const View& keys, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width, uint32_t* to) {
    // The factor is K^T: pairs run along the head, and are neighbours in a key already.
    for (int64_t n = 0; n < count; ++n) {
        const auto* row = reinterpret_cast<const uint32_t*>(keys.at(b, h, first + n));
        for (int64_t pair = 0; pair < width / 2; ++pair) to[pair * count + n] = row[pair];
    }
}

void pack_values(const View& values, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width, uint32_t* to) {
    for (int64_t n = 0; n < count; n += 2) {
        const auto* even = reinterpret_cast<const uint16_t*>(values.at(b, h, first + n));
        const auto* odd = n + 1 < count ? reinterpret_cast<const uint16_t*>(values.at(b, h, first + n + 1)) : nullptr;
        for (int64_t i = 0; i < width; ++i)
            to[n / 2 * width + i] = even[i] | static_cast<uint32_t>(odd ? odd[i] : 0) << 16;
    }
}

// One block of queries of one head, against all keys.
struct Worker {
    int64_t width;
    float scale;  // of scores, times log2(e)
    decltype(aligned<float>(0)) scores = aligned<float>(kQueries * kKeys);
    decltype(aligned<uint16_t>(0)) weights = aligned<uint16_t>(kQueries * kKeys);
    decltype(aligned<float>(0)) result = aligned<float>(kQueries * width);
    float highest[kQueries], sum[kQueries];

    void start(int64_t rows) {
        std::fill_n(result.get(), rows * width, 0.f);
        std::fill_n(highest, rows, -std::numeric_limits<float>::infinity());
        std::fill_n(sum, rows, 0.f);
    }

    void meet(const BFloat16* queries, int64_t stride, int64_t rows, const uint32_t* keys, const uint32_t* values, int64_t count) {
        const int64_t even = (count + 1) / 2 * 2;  // a pair of weights may end in a zero
        brgemm(rows, count, width, stride, count, count, false, queries, reinterpret_cast<const BFloat16*>(keys), scores.get());
        for (int64_t m = 0; m < rows; ++m) soften(m, count, even);
        brgemm(rows, width, even, even, width, width, true, reinterpret_cast<const BFloat16*>(weights.get()),
               reinterpret_cast<const BFloat16*>(values), result.get());
    }

    // Scores of a row become weights 2^(score - maximum so far); what was summed before is scaled to that maximum.
    void soften(int64_t m, int64_t count, int64_t even) {
        const float* row = scores.get() + m * count;
        uint16_t* to = weights.get() + m * even;
        float top = highest[m];
#pragma omp simd reduction(max : top)
        for (int64_t n = 0; n < count; ++n) top = std::max(top, row[n] * scale);
        const float shrink = exp2_of(highest[m] - top);
        float total = 0.f;
#pragma omp simd reduction(+ : total)
        for (int64_t n = 0; n < count; ++n) {
            const float weight = exp2_of(row[n] * scale - top);
            total += weight;
            to[n] = rounded(weight);
        }
        if (even > count) to[count] = 0;
        sum[m] = sum[m] * shrink + total;
        highest[m] = top;
        float* so_far = result.get() + m * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) so_far[i] *= shrink;
    }

    void finish(BFloat16* out, int64_t stride, int64_t rows) const {
        for (int64_t m = 0; m < rows; ++m)
            for (int64_t i = 0; i < width; ++i) out[m * stride + i] = BFloat16(result[m * width + i] / sum[m]);
    }
};

}  // namespace

// sizes: B, H, S, D. strides: batch, head and token stride of query, key, value and out, in elements.
extern "C" int joint_attention_bf16(
    void* query, void* key, void* value, void* out, const int64_t* sizes, const int64_t* strides, float scale, int threads) {
    const int64_t heads = sizes[0] * sizes[1], tokens = sizes[2], width = sizes[3];
    auto view = [&](void* data, int n) {
        return View{static_cast<BFloat16*>(data), strides[3 * n], strides[3 * n + 1], strides[3 * n + 2]};
    };
    const View q = view(query, 0), k = view(key, 1), v = view(value, 2), o = view(out, 3);
    const int64_t key_blocks = (tokens + kKeys - 1) / kKeys, query_blocks = (tokens + kQueries - 1) / kQueries;
    const int64_t of_block = kKeys * width / 2;  // packed, in pairs
    auto keys = aligned<uint32_t>(heads * key_blocks * of_block);
    auto values = aligned<uint32_t>(heads * key_blocks * of_block);
    if (!keys || !values) return 1;

#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t job = 0; job < heads * key_blocks; ++job) {
            const int64_t head = job / key_blocks, first = job % key_blocks * kKeys;
            const int64_t count = std::min(kKeys, tokens - first), b = head / sizes[1], h = head % sizes[1];
            pack_keys(k, b, h, first, count, width, keys.get() + job * of_block);
            pack_values(v, b, h, first, count, width, values.get() + job * of_block);
        }
        Worker worker{width, scale * 1.44269504f};
#pragma omp for schedule(dynamic)
        for (int64_t job = 0; job < heads * query_blocks; ++job) {
            const int64_t head = job / query_blocks, first = job % query_blocks * kQueries;
            const int64_t rows = std::min(kQueries, tokens - first), b = head / sizes[1], h = head % sizes[1];
            worker.start(rows);
            for (int64_t block = 0; block < key_blocks; ++block) {
                const int64_t at = (head * key_blocks + block) * of_block;
                worker.meet(q.at(b, h, first), q.token, rows, keys.get() + at, values.get() + at,
                            std::min(kKeys, tokens - block * kKeys));
            }
            worker.finish(o.at(b, h, first), o.token, rows);
        }
        at::native::cpublas::brgemm_release();
    }
    return 0;
}
