// One AdamW update of one parameter, shared by the CPU and the CUDA kernel; the specification is
// selfnpo_kernels/reference.py.
#pragma once

#include <cmath>

#include "bits.h"

namespace selfnpo {

// Rounded once from double precision: 1 - 0.999f would be off by 1e-5 of itself.
struct AdamWSettings {
    float beta2, rest1, rest2, log_beta1, log_beta2, eps, weight_decay, ema_weight;

    AdamWSettings(double beta1, double beta2, double eps, double weight_decay, double ema_decay)
        : beta2(static_cast<float>(beta2)),
          rest1(static_cast<float>(1 - beta1)),
          rest2(static_cast<float>(1 - beta2)),
          log_beta1(static_cast<float>(std::log(beta1))),
          log_beta2(static_cast<float>(std::log(beta2))),
          eps(static_cast<float>(eps)),
          weight_decay(static_cast<float>(weight_decay)),
          ema_weight(static_cast<float>(1 - ema_decay)) {}
};

// Values that all updates of one step share.
struct AdamWStep {
    float grad_scale, decay, step_size, rest1, beta2, rest2, correction2_sqrt, eps, ema_weight;
};

// One tensor. `low` and `ema_low` are the low halves of split weights, or null if weights are float32.
struct AdamWTensor {
    void* param;
    int16_t* low;
    const void* grad;
    float *exp_avg, *exp_avg_sq;
    void* ema;
    int16_t* ema_low;
    int64_t elements;
};

SELFNPO_ANYWHERE AdamWStep adamw_step(const AdamWSettings& settings, int64_t step, float lr, float grad_scale) {
    // 1 - beta^step, without cancellation at small steps.
    const float count = static_cast<float>(step);
    const float correction1 = -expm1f(count * settings.log_beta1), correction2 = -expm1f(count * settings.log_beta2);
    AdamWStep now;
    now.grad_scale = grad_scale;
    now.decay = 1.0f - lr * settings.weight_decay;
    now.step_size = lr / correction1;
    now.rest1 = settings.rest1;
    now.beta2 = settings.beta2;
    now.rest2 = settings.rest2;
    now.correction2_sqrt = sqrtf(correction2);
    now.eps = settings.eps;
    now.ema_weight = settings.ema_weight;
    return now;
}

SELFNPO_ANYWHERE void adamw(float& param, float& exp_avg, float& exp_avg_sq, float grad, const AdamWStep& step) {
    grad *= step.grad_scale;
    exp_avg += step.rest1 * (grad - exp_avg);
    exp_avg_sq = step.beta2 * exp_avg_sq + step.rest2 * grad * grad;
    const float denominator = sqrtf(exp_avg_sq) / step.correction2_sqrt + step.eps;
    param = param * step.decay - step.step_size * (exp_avg / denominator);
}

// The bits of a float32 weight are the sum of its nearest bfloat16 and a signed 16-bit remainder, so nothing is lost.
SELFNPO_ANYWHERE float join(uint16_t high, int16_t low) {
    return bits_to_float((static_cast<uint32_t>(high) << 16) + static_cast<uint32_t>(static_cast<int32_t>(low)));
}

SELFNPO_ANYWHERE void split(float value, uint16_t& high, int16_t& low) {
    uint32_t bits = float_to_bits(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) bits = 0x7FC00000u;  // an all-ones NaN, as GPUs produce it, would round to -0
    high = static_cast<uint16_t>((bits + 0x8000u) >> 16);
    low = static_cast<int16_t>(bits & 0xFFFFu);
}

}  // namespace selfnpo
