// m = uncond + g (cond - uncond); x_0 = p0 x + q0 m; x_prev = p1 x + q1 m.
#include "ops.h"

namespace selfnpo {
namespace {

// All memory streams in one loop, so that the processor fetches them in parallel.
template <bool kPrev, bool kUncond>
inline void step(float* __restrict prev, float* __restrict original, const float* __restrict x, const float* __restrict cond,
                 const float* __restrict uncond, const float* row, float scale, int64_t count) {
    const float p0 = row[0], q0 = row[1], p1 = kPrev ? row[2] : 0.0f, q1 = kPrev ? row[3] : 0.0f;
    for (int64_t i = 0; i < count; ++i) {
        const float m = kUncond ? uncond[i] + scale * (cond[i] - uncond[i]) : cond[i];
        original[i] = term(p0, x[i]) + term(q0, m);
        if (kPrev) prev[i] = term(p1, x[i]) + term(q1, m);
    }
}

SELFNPO_VECTORISED void tweedie(float* original, const float* x, const float* m, const float* row, int64_t count) {
    step<false, false>(nullptr, original, x, m, nullptr, row, 1.0f, count);
}

SELFNPO_VECTORISED void unguided(float* prev, float* original, const float* x, const float* cond, const float* row,
                                 int64_t count) {
    step<true, false>(prev, original, x, cond, nullptr, row, 1.0f, count);
}

SELFNPO_VECTORISED void guided(float* prev, float* original, const float* x, const float* cond, const float* uncond,
                               const float* row, float scale, int64_t count) {
    step<true, true>(prev, original, x, cond, uncond, row, scale, count);
}

}  // namespace

void guided_step(const GuidedStep& op, int threads) {
    prepare_output(op.pred_original_sample, op.batch * op.elements);
    if (op.prev_sample.data) prepare_output(op.prev_sample, op.batch * op.elements);
    for_each_block(op.batch, op.elements, threads, [&](int64_t sample, int64_t begin, int64_t count) {
        const float* row = op.rows[sample];
        const int64_t at = sample * op.elements + begin;
        Buffer x_buffer, cond_buffer, uncond_buffer, original_buffer, prev_buffer;
        const float* x = read(op.sample, at, count, x_buffer);
        const float* cond = read(op.cond, at, count, cond_buffer);
        float* original = target(op.pred_original_sample, at, original_buffer);
        if (op.prev_sample.data == nullptr) {
            tweedie(original, x, cond, row, count);
        } else {
            float* prev = target(op.prev_sample, at, prev_buffer);
            if (op.uncond.data == nullptr) {
                unguided(prev, original, x, cond, row, count);
            } else {
                const float* uncond = read(op.uncond, at, count, uncond_buffer);
                guided(prev, original, x, cond, uncond, row, op.guidance_scale, count);
            }
            finish(op.prev_sample, at, count, prev_buffer);
        }
        finish(op.pred_original_sample, at, count, original_buffer);
    });
}

}  // namespace selfnpo
