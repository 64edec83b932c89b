// Attention over all tokens in bfloat16 for CPUs with AVX512-BF16, after FlashAttention (arXiv 2205.14135).
//
// A block of queries meets blocks of keys in turn; scores, their running maximum and sum, and the result so far
// stay in float32 and in the cache. Both products are oneDNN's micro-kernels, which PyTorch exports.

#include <ATen/native/CPUBlas.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>

using at::BFloat16;
using at::native::cpublas::brgemm;

namespace {

constexpr int64_t kQueries = 64;  // rows of scores at a time: with kKeys, 128 KiB of float32
constexpr int64_t kKeys = 512;
constexpr int64_t kLanes = 16;  // float32 numbers in a register

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

// 2^x for x <= 0. NaN stays NaN. The polynomial is 2^f on [-1/2, 1/2], relative error below 3e-6: weights are
// rounded to bfloat16 afterwards, which moves them by up to 2e-3.
inline __m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.f), x);  // of a number and a NaN the instruction gives the second
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(9.5828531e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5906425e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4024099e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9312419e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f));
    return _mm512_scalef_ps(p, whole);
}

// Calls body(n, mask of the lanes that count) for n = 0, 16, ... The last mask alone may be partial.
template <typename Body>
inline void each_lanes(int64_t count, const Body& body) {
    int64_t n = 0;
    for (; n + kLanes <= count; n += kLanes) body(n, 0xffff);
    if (n < count) body(n, (1 << (count - n)) - 1);
}

// Pairs of neighbouring rows interleaved, as the micro-kernels want their second factor.
void pack_keys(const View& keys, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width, uint32_t* to) {
    // The factor is K^T: pairs run along the head, and are neighbours in a key already.
    for (int64_t from = 0; from < count; from += kLanes)  // so many keys share a line of what is written
        for (int64_t pair = 0; pair < width / 2; ++pair)
            for (int64_t n = from; n < std::min(from + kLanes, count); ++n)
                to[pair * count + n] = reinterpret_cast<const uint32_t*>(keys.at(b, h, first + n))[pair];
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
        __m512 tops = _mm512_set1_ps(highest[m]);
        each_lanes(count, [&](int64_t n, __mmask16 here) {
            tops = _mm512_mask_max_ps(tops, here, _mm512_maskz_loadu_ps(here, row + n), tops);
        });
        const float top = _mm512_reduce_max_ps(tops);
        const __m512 factor = _mm512_set1_ps(scale), most = _mm512_set1_ps(top);
        __m512 total = _mm512_setzero_ps();
        each_lanes(count, [&](int64_t n, __mmask16 here) {
            // The difference first: of large scores a product with the factor would leave a rounding above zero.
            const __m512 below = _mm512_sub_ps(_mm512_maskz_loadu_ps(here, row + n), most);
            const __m512 weight = exp2_of(_mm512_mul_ps(below, factor));
            total = _mm512_mask_add_ps(total, here, total, weight);
            _mm256_mask_storeu_epi16(to + n, here, (__m256i)_mm512_cvtneps_pbh(weight));
        });
        if (even > count) to[count] = 0;
        const float shrink = _mm512_cvtss_f32(exp2_of(_mm512_set1_ps((highest[m] - top) * scale)));
        sum[m] = sum[m] * shrink + _mm512_reduce_add_ps(total);
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
