// AdamW over many tensors, one pass over memory.
#include "../adamw.h"

#include "ops.h"

namespace selfnpo {
namespace {

SELFNPO_VECTORISED void update(float* __restrict param, const float* __restrict grad, float* __restrict exp_avg,
                               float* __restrict exp_avg_sq, int64_t count, const AdamWStep step) {
    for (int64_t i = 0; i < count; ++i) adamw(param[i], exp_avg[i], exp_avg_sq[i], grad[i], step);
}

SELFNPO_VECTORISED void average(float* __restrict ema, const float* __restrict param, int64_t count, float weight) {
    for (int64_t i = 0; i < count; ++i) ema[i] += weight * (param[i] - ema[i]);
}

SELFNPO_VECTORISED void join_block(const uint16_t* __restrict high, const int16_t* __restrict low, float* __restrict out,
                                   int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = join(high[i], low[i]);
}

SELFNPO_VECTORISED void split_block(const float* __restrict value, uint16_t* __restrict high, int16_t* __restrict low,
                                    int64_t count) {
    for (int64_t i = 0; i < count; ++i) split(value[i], high[i], low[i]);
}

// A block of float32 or split weights as float32, written back by the destructor.
class Weights {
  public:
    Weights(void* data, int16_t* low, int64_t begin, int64_t count) : count_(count) {
        if (low == nullptr) {
            values = static_cast<float*>(data) + begin;
        } else {
            high_ = static_cast<uint16_t*>(data) + begin;
            low_ = low + begin;
            join_block(high_, low_, buffer_, count);
        }
    }
    ~Weights() {
        if (low_) split_block(buffer_, high_, low_, count_);
    }
    Weights(const Weights&) = delete;
    Weights& operator=(const Weights&) = delete;

    float* values = buffer_;

  private:
    Buffer buffer_;
    uint16_t* high_ = nullptr;
    int16_t* low_ = nullptr;
    int64_t count_;
};

}  // namespace

void fused_adamw(const std::vector<AdamWTensor>& tensors, Dtype grad_dtype, const AdamWStep& step, int threads) {
    for (const AdamWTensor& tensor : tensors) {
        for_each_block(1, tensor.elements, threads, [&](int64_t, int64_t begin, int64_t count) {
            Buffer grad_buffer;
            const float* grad = read({tensor.grad, grad_dtype}, begin, count, grad_buffer);
            Weights param(tensor.param, tensor.low, begin, count);
            update(param.values, grad, tensor.exp_avg + begin, tensor.exp_avg_sq + begin, count, step);
            if (tensor.ema) {
                Weights ema(tensor.ema, tensor.ema_low, begin, count);
                average(ema.values, param.values, count, step.ema_weight);
            }
        });
    }
}

}  // namespace selfnpo
