// out = negative + g (positive - negative), optionally mixed with itself rescaled to the positive's standard deviation.
#include "ops.h"

#include <cmath>

namespace selfnpo {
namespace {

struct Moments {
    double positive = 0, positive2 = 0, guided = 0, guided2 = 0;
};

SELFNPO_VECTORISED void accumulate(const float* values, int64_t count, double& sum, double& sum2) {
    constexpr int kLanes = 16;
    double lane[kLanes] = {}, lane2[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        for (int k = 0; k < kLanes; ++k) {
            const double value = values[i + k];
            lane[k] += value;
            lane2[k] += value * value;
        }
    }
    for (; i < count; ++i) lane[0] += values[i], lane2[0] += double{values[i]} * values[i];
    for (int k = 0; k < kLanes; ++k) sum += lane[k], sum2 += lane2[k];
}

}  // namespace

void cfg_combine(const CfgCombine& op, int threads) {
    prepare_output(op.out, op.batch * op.elements);
    const auto guided_block = [&](int64_t at, int64_t count, float* out, const float*& positive, float* buffer) {
        Buffer negative_buffer;
        positive = read(op.model_output, op.batch * op.elements + at, count, buffer);
        guide(out, read(op.model_output, at, count, negative_buffer), positive, op.guidance_scale, count);
    };

    std::vector<float> factor(op.batch, 1.0f);
    if (op.guidance_rescale != 0.0f) {
        const int64_t per_sample = (op.elements + kBlock - 1) / kBlock;
        std::vector<Moments> blocks(op.batch * per_sample);
        for_each_block(op.batch, op.elements, threads, [&](int64_t sample, int64_t begin, int64_t count) {
            Buffer buffer, guided;
            const float* positive;
            guided_block(sample * op.elements + begin, count, guided, positive, buffer);
            Moments& moments = blocks[sample * per_sample + begin / kBlock];
            accumulate(positive, count, moments.positive, moments.positive2);
            accumulate(guided, count, moments.guided, moments.guided2);
        });
        for (int64_t sample = 0; sample < op.batch; ++sample) {
            Moments total;
            for (int64_t block = 0; block < per_sample; ++block) {
                const Moments& part = blocks[sample * per_sample + block];
                total.positive += part.positive, total.positive2 += part.positive2;
                total.guided += part.guided, total.guided2 += part.guided2;
            }
            const double n = static_cast<double>(op.elements);
            const double ratio = std::sqrt((total.positive2 - total.positive * total.positive / n) /
                                           (total.guided2 - total.guided * total.guided / n));
            factor[sample] = static_cast<float>(op.guidance_rescale * ratio + (1.0 - op.guidance_rescale));
        }
    }
    for_each_block(op.batch, op.elements, threads, [&](int64_t sample, int64_t begin, int64_t count) {
        const int64_t at = sample * op.elements + begin;
        Buffer buffer, out_buffer;
        const float* positive;
        float* out = target(op.out, at, out_buffer);
        guided_block(at, count, out, positive, buffer);
        if (op.guidance_rescale != 0.0f) {
            for (int64_t i = 0; i < count; ++i) out[i] *= factor[sample];
        }
        finish(op.out, at, count, out_buffer);
    });
}

}  // namespace selfnpo
