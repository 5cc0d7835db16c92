#include "kernel.h"

#include "../bits.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace selfnpo {
namespace {

SELFNPO_VECTORISED void from_bfloat16(const uint16_t* __restrict in, float* __restrict out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = bits_to_float(uint32_t{in[i]} << 16);
}

// To nearest, ties to even; NaN stays NaN.
SELFNPO_VECTORISED void to_bfloat16(const float* __restrict in, uint16_t* __restrict out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = float_to_bits(in[i]);
        const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
        out[i] = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
    }
}

SELFNPO_VECTORISED void from_float16(const uint16_t* __restrict in, float* __restrict out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t half = in[i], magnitude = (half & 0x7FFF) << 13, sign = (half & 0x8000) << 16;
        // Rebias the exponent from 15 to 127; infinities and NaN need it twice, subnormals are renormalised exactly.
        const uint32_t normal = magnitude + (112u << 23);
        const uint32_t special = magnitude + (224u << 23);
        const uint32_t subnormal = float_to_bits(bits_to_float(magnitude + (113u << 23)) - bits_to_float(113u << 23));
        const uint32_t value = magnitude >= (31u << 23) ? special : magnitude < (1u << 23) ? subnormal : normal;
        out[i] = bits_to_float(value | sign);
    }
}

// To nearest, ties to even; overflow becomes infinity, NaN stays NaN.
SELFNPO_VECTORISED void to_float16(const float* __restrict in, uint16_t* __restrict out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = float_to_bits(in[i]), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7FFFFFFF;
        const uint32_t normal = (magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
        const uint32_t subnormal =
            float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);  // the addition rounds
        const uint32_t special = magnitude > 0x7F800000 ? 0x7E00 : 0x7C00;
        const uint32_t value = magnitude >= (143u << 23) ? special : magnitude < (113u << 23) ? subnormal : normal;
        out[i] = static_cast<uint16_t>(value | sign);
    }
}

}  // namespace

const float* read(const ConstTensor& tensor, int64_t begin, int64_t count, float* buffer) {
    if (tensor.dtype == Dtype::float32) return static_cast<const float*>(tensor.data) + begin;
    const uint16_t* data = static_cast<const uint16_t*>(tensor.data) + begin;
    (tensor.dtype == Dtype::bfloat16 ? from_bfloat16 : from_float16)(data, buffer, count);
    return buffer;
}

float* target(const Tensor& tensor, int64_t begin, float* buffer) {
    return tensor.dtype == Dtype::float32 ? static_cast<float*>(tensor.data) + begin : buffer;
}

void finish(const Tensor& tensor, int64_t begin, int64_t count, const float* buffer) {
    if (tensor.dtype == Dtype::float32) return;
    uint16_t* data = static_cast<uint16_t*>(tensor.data) + begin;
    (tensor.dtype == Dtype::bfloat16 ? to_bfloat16 : to_float16)(buffer, data, count);
}

SELFNPO_VECTORISED void affine(float* __restrict out, float a, const float* __restrict x, float b, const float* __restrict y,
                               int64_t count) {
    if (a == 0.0f && b == 0.0f) {
        std::fill(out, out + count, 0.0f);
    } else if (b == 0.0f) {
        for (int64_t i = 0; i < count; ++i) out[i] = a * x[i];
    } else if (a == 0.0f) {
        for (int64_t i = 0; i < count; ++i) out[i] = b * y[i];
    } else {
        for (int64_t i = 0; i < count; ++i) out[i] = a * x[i] + b * y[i];
    }
}

SELFNPO_VECTORISED void guide(float* __restrict out, const float* __restrict negative, const float* __restrict positive,
                              float scale, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = negative[i] + scale * (positive[i] - negative[i]);
}

void prepare_output(const Tensor& tensor, int64_t elements) {
#ifdef __linux__
    constexpr uintptr_t kPage = 2u << 20;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data);
    const uintptr_t end = begin + elements * (tensor.dtype == Dtype::float32 ? 4 : 2);
    // From 32 MiB on, the C library maps fresh memory for every allocation and unmaps it afterwards.
    if (end - begin >= 16 * kPage) {
        const uintptr_t aligned = (begin + kPage - 1) / kPage * kPage;
        madvise(reinterpret_cast<void*>(aligned), end - aligned, MADV_HUGEPAGE);  // a hint: failure changes nothing
    }
#else
    (void)tensor, (void)elements;
#endif
}

}  // namespace selfnpo
