// Philox words of consecutive counters. Products of 32-bit words are 64 bits wide, which compilers vectorise badly, so there
// are separate versions for AVX2 and AVX-512. The loader picks one. All give the same integers.
#pragma once

#include "../philox.h"
#include "kernel.h"

#ifdef SELFNPO_X86
#include <immintrin.h>
#endif

namespace selfnpo {

constexpr int64_t kCounters = kBlock / 4;

struct Counters {
    uint32_t first;  // element / 4; the others follow consecutively
    uint32_t step, site, sample_id;
    uint64_t seed;
};

// word[k][i]: word k of counter first + i, for i < count; count is a multiple of 16.
using Words = uint32_t[4][kCounters];

#ifdef SELFNPO_X86

// Even and odd counters sit in 64-bit lanes, whose upper halves the multiplication ignores.
__attribute__((target("avx512f"))) inline void philox_rounds(__m512i (&c)[4], uint64_t seed) {
    const __m512i multiplier0 = _mm512_set1_epi64(0xD2511F53), multiplier1 = _mm512_set1_epi64(0xCD9E8D57);
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const __m512i product0 = _mm512_mul_epu32(c[0], multiplier0), product1 = _mm512_mul_epu32(c[2], multiplier1);
        c[0] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), c[1], _mm512_set1_epi64(key0), 0x96);
        c[1] = product1;
        c[2] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), c[3], _mm512_set1_epi64(key1), 0x96);
        c[3] = product0;
        key0 += 0x9E3779B9, key1 += 0xBB67AE85;
    }
}

__attribute__((target("avx512f"))) inline void philox_words(const Counters& at, int64_t count, Words& word) {
    const __m512i lane = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
    for (int64_t i = 0; i < count; i += 16) {
        __m512i even[4] = {_mm512_add_epi64(_mm512_set1_epi64(at.first + i), lane), _mm512_set1_epi64(at.step),
                           _mm512_set1_epi64(at.site), _mm512_set1_epi64(at.sample_id)};
        __m512i odd[4] = {_mm512_add_epi64(even[0], _mm512_set1_epi64(1)), even[1], even[2], even[3]};
        philox_rounds(even, at.seed);
        philox_rounds(odd, at.seed);
        for (int k = 0; k < 4; ++k) {
            const __m512i merged = _mm512_mask_blend_epi32(0xAAAA, even[k], _mm512_slli_epi64(odd[k], 32));
            _mm512_storeu_si512(word[k] + i, merged);
        }
    }
}

__attribute__((target("avx2"))) inline void philox_rounds(__m256i (&c)[4], uint64_t seed) {
    const __m256i multiplier0 = _mm256_set1_epi64x(0xD2511F53), multiplier1 = _mm256_set1_epi64x(0xCD9E8D57);
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const __m256i product0 = _mm256_mul_epu32(c[0], multiplier0), product1 = _mm256_mul_epu32(c[2], multiplier1);
        const __m256i keyed0 = _mm256_xor_si256(c[1], _mm256_set1_epi64x(key0));
        const __m256i keyed1 = _mm256_xor_si256(c[3], _mm256_set1_epi64x(key1));
        c[0] = _mm256_xor_si256(_mm256_srli_epi64(product1, 32), keyed0);
        c[1] = product1;
        c[2] = _mm256_xor_si256(_mm256_srli_epi64(product0, 32), keyed1);
        c[3] = product0;
        key0 += 0x9E3779B9, key1 += 0xBB67AE85;
    }
}

__attribute__((target("avx2"))) inline void philox_words(const Counters& at, int64_t count, Words& word) {
    const __m256i lane = _mm256_setr_epi64x(0, 2, 4, 6);
    for (int64_t i = 0; i < count; i += 8) {
        __m256i even[4] = {_mm256_add_epi64(_mm256_set1_epi64x(at.first + i), lane), _mm256_set1_epi64x(at.step),
                           _mm256_set1_epi64x(at.site), _mm256_set1_epi64x(at.sample_id)};
        __m256i odd[4] = {_mm256_add_epi64(even[0], _mm256_set1_epi64x(1)), even[1], even[2], even[3]};
        philox_rounds(even, at.seed);
        philox_rounds(odd, at.seed);
        for (int k = 0; k < 4; ++k) {
            const __m256i merged = _mm256_blend_epi32(even[k], _mm256_slli_epi64(odd[k], 32), 0xAA);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(word[k] + i), merged);
        }
    }
}

__attribute__((target("default")))
#endif
inline void philox_words(const Counters& at, int64_t count, Words& word) {
    for (int64_t i = 0; i < count; ++i) {
        uint32_t c0 = at.first + static_cast<uint32_t>(i), c1 = at.step, c2 = at.site, c3 = at.sample_id;
        philox_4x32(c0, c1, c2, c3, static_cast<uint32_t>(at.seed), static_cast<uint32_t>(at.seed >> 32));
        word[0][i] = c0, word[1][i] = c1, word[2][i] = c2, word[3][i] = c3;
    }
}

}  // namespace selfnpo
