// m = uncond + g (cond - uncond); x_0 = p0 x + q0 m; x_prev = p1 x + q1 m.
#include "ops.h"

namespace selfnpo {

void guided_step(const GuidedStep& op, int threads) {
    prepare_output(op.pred_original_sample, op.batch * op.elements);
    if (op.prev_sample.data) prepare_output(op.prev_sample, op.batch * op.elements);
    for_each_block(op.batch, op.elements, threads, [&](int64_t sample, int64_t begin, int64_t count) {
        const float* row = op.rows[sample];
        const int64_t at = sample * op.elements + begin;
        Buffer x_buffer, m_buffer, uncond_buffer, guided, out_buffer;
        const float* x = read(op.sample, at, count, x_buffer);
        const float* m = read(op.cond, at, count, m_buffer);
        if (op.uncond.data) {
            guide(guided, read(op.uncond, at, count, uncond_buffer), m, op.guidance_scale, count);
            m = guided;
        }
        affine(target(op.pred_original_sample, at, out_buffer), row[0], x, row[1], m, count);
        finish(op.pred_original_sample, at, count, out_buffer);
        if (op.prev_sample.data) {
            affine(target(op.prev_sample, at, out_buffer), row[2], x, row[3], m, count);
            finish(op.prev_sample, at, count, out_buffer);
        }
    });
}

}  // namespace selfnpo
