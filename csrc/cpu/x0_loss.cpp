// d = p x + q m - k t; the mean of d^2 or of sqrt(d^2 + c^2) - c, and its gradient.
#include "ops.h"

#include <cmath>

namespace selfnpo {
namespace {

struct Coefficients {
    float p, q, k;
};

inline float difference(const Coefficients& row, float x, float m, float t) {
    return term(row.p, x) + term(row.q, m) + term(-row.k, t);
}

SELFNPO_VECTORISED double sum_of_losses(const Coefficients row, const float* __restrict x, const float* __restrict m,
                                        const float* __restrict t, int64_t count, bool huber, float c) {
    Buffer loss;
    for (int64_t i = 0; i < count; ++i) {
        const float d = difference(row, x[i], m[i], t[i]), d2 = d * d;
        loss[i] = huber ? d2 / (std::sqrt(d2 + c * c) + c) : d2;  // sqrt(d^2 + c^2) - c without its cancellation
    }
    constexpr int64_t kLanes = 16;
    float lane[kLanes] = {};
    for (int64_t i = 0; i + kLanes <= count; i += kLanes) {
        for (int64_t k = 0; k < kLanes; ++k) lane[k] += loss[i + k];
    }
    double sum = 0;
    for (const float part : lane) sum += part;
    for (int64_t i = count / kLanes * kLanes; i < count; ++i) sum += loss[i];
    return sum;
}

SELFNPO_VECTORISED void gradient(float* __restrict out, const Coefficients row, const float* __restrict x,
                                 const float* __restrict m, const float* __restrict t, int64_t count, bool huber, float c,
                                 float coefficient, float scale) {
    for (int64_t i = 0; i < count; ++i) {
        const float d = difference(row, x[i], m[i], t[i]);
        const float slope = huber ? scale / (2.0f * std::sqrt(d * d + c * c)) : scale;
        out[i] = term(coefficient, slope * (2.0f * d));
    }
}

}  // namespace

double x0_loss(const X0Loss& op, int threads) {
    // One partial sum per block, added in order: the result does not depend on the number of threads.
    const int64_t per_sample = (op.elements + kBlock - 1) / kBlock;
    std::vector<double> partial(op.batch * per_sample);
    for_each_block(op.batch, op.elements, threads, [&](int64_t sample, int64_t begin, int64_t count) {
        const float* row = op.rows[sample];
        const int64_t at = sample * op.elements + begin;
        Buffer x, m, t;
        partial[sample * per_sample + begin / kBlock] =
            sum_of_losses({row[0], row[1], row[2]}, read(op.sample, at, count, x), read(op.model_output, at, count, m),
                          read(op.target, at, count, t), count, op.huber, op.huber_c);
    });
    double sum = 0;
    for (const double part : partial) sum += part;
    return sum / static_cast<double>(op.batch * op.elements);
}

void x0_loss_backward(const X0Loss& op, const Tensor& grad, float scale, int operand, int threads) {
    prepare_output(grad, op.batch * op.elements);
    for_each_block(op.batch, op.elements, threads, [&](int64_t sample, int64_t begin, int64_t count) {
        const float* row = op.rows[sample];
        const int64_t at = sample * op.elements + begin;
        Buffer x, m, t, out;
        gradient(target(grad, at, out), {row[0], row[1], row[2]}, read(op.sample, at, count, x),
                 read(op.model_output, at, count, m), read(op.target, at, count, t), count, op.huber, op.huber_c,
                 operand == 2 ? -row[2] : row[operand], scale);
        finish(grad, at, count, out);
    });
}

}  // namespace selfnpo
