// The CPU kernels. Tensors are dense [batch, elements] in one memory order; `rows` holds `row_stride` floats per sample
// (0 if all samples share a row). Callers check shapes, dtypes and sizes.
#pragma once

#include "../adamw.h"
#include "kernel.h"

namespace selfnpo {

struct Rows {
    const float* data;
    int64_t stride;
    const float* operator[](int64_t sample) const { return data + sample * stride; }
};

struct GuidedStep {
    Tensor prev_sample, pred_original_sample;  // prev_sample may be absent
    ConstTensor sample, cond, uncond;          // uncond may be absent
    Rows rows;                                 // p0, q0[, p1, q1]
    float guidance_scale;
    int64_t batch, elements;
};
void guided_step(const GuidedStep& op, int threads);

struct CfgCombine {
    Tensor out;                // [batch, elements]
    ConstTensor model_output;  // [2 batch, elements]: negative, positive
    float guidance_scale, guidance_rescale;
    int64_t batch, elements;
};
void cfg_combine(const CfgCombine& op, int threads);

struct ForwardJump {
    Tensor out;
    ConstTensor sample;  // may be absent if every a is zero
    Rows rows;           // a, b
    const int64_t* sample_ids;
    int64_t batch, channels, positions;  // element (channel, position) is at position * channels + channel
    uint64_t seed;
    uint32_t step, site;
};
void forward_jump(const ForwardJump& op, int threads);

struct X0Loss {
    ConstTensor sample, model_output, target;
    Rows rows;  // p, q, k
    bool huber;
    float huber_c;
    int64_t batch, elements;
};
double x0_loss(const X0Loss& op, int threads);
// grad = coefficient * scale * d loss / d difference per element; coefficient: p, q or -k by `operand` 0, 1 or 2.
void x0_loss_backward(const X0Loss& op, const Tensor& grad, float scale, int operand, int threads);

void fused_adamw(const std::vector<AdamWTensor>& tensors, Dtype grad_dtype, const AdamWStep& step, int threads);

}  // namespace selfnpo
