// Floats and their bits, on the CPU and in CUDA.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SELFNPO_ANYWHERE __host__ __device__ inline
#else
#define SELFNPO_ANYWHERE inline
#endif

namespace selfnpo {

SELFNPO_ANYWHERE float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

SELFNPO_ANYWHERE uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

}  // namespace selfnpo
