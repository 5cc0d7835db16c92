// One AdamW update of one parameter, shared by the CPU and the CUDA kernel; the specification is
// selfnpo_kernels/reference.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SELFNPO_INLINE __host__ __device__ __forceinline__
#else
#define SELFNPO_INLINE inline
#endif

namespace selfnpo {

struct AdamWSettings {
    float beta1, beta2, eps, weight_decay, ema_decay;
};

// What one step's updates share.
struct AdamWStep {
    float grad_scale, decay, step_size, beta1, beta2, correction2_sqrt, eps, ema_weight;
};

// One tensor: `low` and `ema_low` hold the low halves of split weights, or are absent where weights are float32.
struct AdamWTensor {
    void* param;
    int16_t* low;
    const void* grad;
    float *exp_avg, *exp_avg_sq;
    void* ema;
    int16_t* ema_low;
    int64_t elements;
};

SELFNPO_INLINE AdamWStep adamw_step(const AdamWSettings& settings, int64_t step, float lr, float grad_scale) {
    // 1 - beta^step without the cancellation at small steps.
    const float count = static_cast<float>(step);
    const float correction1 = -expm1f(count * log1pf(settings.beta1 - 1.0f));
    const float correction2 = -expm1f(count * log1pf(settings.beta2 - 1.0f));
    return {grad_scale,     1.0f - lr * settings.weight_decay, lr / correction1, settings.beta1,
            settings.beta2, sqrtf(correction2),                settings.eps,     1.0f - settings.ema_decay};
}

SELFNPO_INLINE void adamw(float& param, float& exp_avg, float& exp_avg_sq, float grad, const AdamWStep& step) {
    grad *= step.grad_scale;
    exp_avg += (1.0f - step.beta1) * (grad - exp_avg);
    exp_avg_sq = step.beta2 * exp_avg_sq + (1.0f - step.beta2) * grad * grad;
    const float denominator = sqrtf(exp_avg_sq) / step.correction2_sqrt + step.eps;
    param = param * step.decay - step.step_size * (exp_avg / denominator);
}

// A float32 weight is the sum of its nearest bfloat16, as bits, and a signed 16-bit remainder: nothing is lost.
SELFNPO_INLINE float join(uint16_t high, int16_t low) {
    const uint32_t bits = (static_cast<uint32_t>(high) << 16) + static_cast<uint32_t>(static_cast<int32_t>(low));
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

SELFNPO_INLINE void split(float value, uint16_t& high, int16_t& low) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    high = static_cast<uint16_t>((bits + 0x8000u) >> 16);
    low = static_cast<int16_t>(bits & 0xFFFFu);
}

}  // namespace selfnpo
