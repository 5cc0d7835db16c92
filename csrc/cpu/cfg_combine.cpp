// out = negative + g (positive - negative), optionally mixed with itself rescaled to the positive's standard deviation.
#include "ops.h"

#include <cmath>

namespace selfnpo {
namespace {

struct Moments {
    double count = 0, mean = 0, deviation2 = 0;

    void add(const Moments& other) {
        const double total = count + other.count, shift = other.mean - mean;
        deviation2 += other.deviation2 + shift * shift * count * other.count / total;
        mean += shift * other.count / total;
        count = total;
    }
};

SELFNPO_VECTORISED Moments moments_of(const float* values, int64_t count) {
    constexpr int kLanes = 16;
    float lane[kLanes] = {}, lane2[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        for (int k = 0; k < kLanes; ++k) lane[k] += values[i + k];
    }
    for (; i < count; ++i) lane[0] += values[i];
    double sum = 0, deviation2 = 0;
    for (int k = 0; k < kLanes; ++k) sum += lane[k];
    const float mean = static_cast<float>(sum / static_cast<double>(count));
    for (i = 0; i + kLanes <= count; i += kLanes) {
        for (int k = 0; k < kLanes; ++k) lane2[k] += (values[i + k] - mean) * (values[i + k] - mean);
    }
    for (; i < count; ++i) lane2[0] += (values[i] - mean) * (values[i] - mean);
    for (int k = 0; k < kLanes; ++k) deviation2 += lane2[k];
    return {static_cast<double>(count), mean, deviation2};
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
        std::vector<Moments> positives(op.batch * per_sample), guideds(op.batch * per_sample);
        for_each_block(op.batch, op.elements, threads, [&](int64_t sample, int64_t begin, int64_t count) {
            Buffer buffer, guided;
            const float* positive;
            guided_block(sample * op.elements + begin, count, guided, positive, buffer);
            positives[sample * per_sample + begin / kBlock] = moments_of(positive, count);
            guideds[sample * per_sample + begin / kBlock] = moments_of(guided, count);
        });
        for (int64_t sample = 0; sample < op.batch; ++sample) {
            Moments positive, guided;
            for (int64_t block = sample * per_sample; block < (sample + 1) * per_sample; ++block) {
                positive.add(positives[block]);
                guided.add(guideds[block]);
            }
            const double ratio = std::sqrt(positive.deviation2 / guided.deviation2);
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
