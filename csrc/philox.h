// Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller; the specification is selfnpo_kernels/philox.py.
//
// Floating-point contraction is off on the CPU (CMakeLists.txt), so every instruction set draws the same bits.
#pragma once

#include <cmath>

#include "bits.h"

namespace selfnpo {

// The counter (element / 4, step, site, sample id) is replaced by the four output words.
SELFNPO_ANYWHERE void philox_4x32(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
        c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
        c1 = static_cast<uint32_t>(product1);
        c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
        c3 = static_cast<uint32_t>(product0);
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
    }
}

// Natural logarithm of a normal positive float, within 1 ulp: x = m 2^e with m in [sqrt(1/2), sqrt(2)), then the Cephes
// polynomial of log(1 + f).
inline float log_positive(float x) {
    const uint32_t offset = float_to_bits(x) - 0x3F3504F3u;
    const float e = static_cast<float>(static_cast<int32_t>(offset) >> 23);
    const float f = bits_to_float((offset & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
    const float f2 = f * f;
    float p = 7.0376836292e-2f;
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    const float tail = p * f * f2 + e * -2.12194440e-4f - 0.5f * f2;
    return f + tail + e * 0.693359375f;
}

// Sine and cosine of an angle in [-pi, pi], within 1 ulp of the result's scale: the nearest multiple of pi/2 is
// subtracted in three exact pieces, and Cephes polynomials do the rest.
inline void sin_cos(float angle, float& sine, float& cosine) {
    const float rounded = angle * 0.636619772f + 12582912.0f;  // 1.5 * 2^23: the low bits now hold the nearest integer
    const uint32_t quadrant = float_to_bits(rounded);
    const float j = rounded - 12582912.0f;
    const float r = ((angle - j * 1.5703125f) - j * 4.83751296997e-4f) - j * 7.54978995489e-8f;
    const float r2 = r * r;
    const float s = ((-1.9515295891e-4f * r2 + 8.3321608736e-3f) * r2 - 1.6666654611e-1f) * r2 * r + r;
    const float c =
        ((2.443315711809948e-5f * r2 - 1.388731625493765e-3f) * r2 + 4.166664568298827e-2f) * r2 * r2 - 0.5f * r2 + 1.0f;
    const uint32_t odd = 0u - (quadrant & 1u);  // all ones if sine and cosine swap
    const uint32_t s_bits = float_to_bits(s), c_bits = float_to_bits(c);
    sine = bits_to_float(((s_bits & ~odd) | (c_bits & odd)) ^ ((quadrant & 2u) << 30));
    cosine = bits_to_float(((c_bits & ~odd) | (s_bits & odd)) ^ (((quadrant + 1u) & 2u) << 30));
}

// Two standard normals from two words.
inline void box_muller(uint32_t word0, uint32_t word1, float& normal0, float& normal1) {
    const float uniform = static_cast<float>(word0) * 0x1p-32f + 0x1p-33f;
    const float angle =
        static_cast<float>(static_cast<int32_t>(word1)) * static_cast<float>(3.14159265358979323846 * 0x1p-31);
    const float radius = std::sqrt(-2.0f * log_positive(uniform));
    float sine, cosine;
    sin_cos(angle, sine, cosine);
    normal0 = radius * cosine;
    normal1 = radius * sine;
}

}  // namespace selfnpo
