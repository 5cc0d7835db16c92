// Shared by the CPU kernels: vectorised loops, threads, and access to tensors of any dtype as blocks of float32.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

// Compiles one body for several instruction sets. The loader picks the widest that the machine has.
#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define SELFNPO_X86
#define SELFNPO_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
#else
#define SELFNPO_VECTORISED
#endif

namespace selfnpo {

// The same order as extension.DTYPES.
enum class Dtype : int { float32, bfloat16, float16 };

struct ConstTensor {
    const void* data;  // dense; nullptr if the operand is absent
    Dtype dtype;
};

struct Tensor {
    void* data;
    Dtype dtype;
};

// Elements in a block, small enough for several operands to fit in the first-level cache.
constexpr int64_t kBlock = 1024;
using Buffer = float[kBlock];

// Elements [begin, begin + count) as float32: the tensor's own memory, or `buffer` with converted values.
const float* read(const ConstTensor& tensor, int64_t begin, int64_t count, float* buffer);
// Where to compute those elements: the tensor's own memory, or `buffer`, which `finish` converts into the tensor.
float* target(const Tensor& tensor, int64_t begin, float* buffer);
void finish(const Tensor& tensor, int64_t begin, int64_t count, const float* buffer);

// A coefficient of zero removes its operand, even an infinite one.
inline float term(float coefficient, float value) { return coefficient == 0.0f ? 0.0f : coefficient * value; }
// out = term(a, x) + term(b, y)
void affine(float* out, float a, const float* x, float b, const float* y, int64_t count);
// out = negative + scale (positive - negative)
void guide(float* out, const float* negative, const float* positive, float scale, int64_t count);

// Requests huge pages for large new outputs: a page fault every 4 KiB costs more than the arithmetic.
void prepare_output(const Tensor& tensor, int64_t elements);

// body(sample, begin, count) for every block of every sample, split over threads. A block never spans two samples.
template <typename Body>
void for_each_block(int64_t batch, int64_t elements, int threads, const Body& body, int64_t length = kBlock) {
    const int64_t per_sample = (elements + length - 1) / length, blocks = batch * per_sample;
    // A thread pays off from about 16,000 elements on. OpenMP's threads are the ones that PyTorch uses too.
    const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(threads, batch * elements / (16 * kBlock)));
#pragma omp parallel for num_threads(workers) schedule(static) if (workers > 1)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t sample = block / per_sample, begin = block % per_sample * length;
        body(sample, begin, std::min(length, elements - begin));
    }
}

}  // namespace selfnpo
