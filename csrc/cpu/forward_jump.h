#pragma once

#include <cstdint>

namespace selfnpo {

struct ForwardJump {
    float* out;                 // [batch, elements]
    const float* sample;        // [batch, elements]
    const float* rows;          // [batch, 2]: a, b
    const int64_t* sample_ids;  // [batch]
    int64_t batch, elements;
    uint64_t seed;
    uint32_t step, site;
};

void forward_jump(const ForwardJump& op, int threads);

}  // namespace selfnpo
