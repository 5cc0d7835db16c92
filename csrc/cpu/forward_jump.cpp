// x_s = a x_t + b z, the noise z drawn where it is used: each element is read once and written once.
#include "forward_jump.h"

#include <algorithm>
#include <thread>
#include <vector>

#include "philox.h"

// One body, compiled for several instruction sets; the loader picks the widest that the machine has.
#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define SELFNPO_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
#else
#define SELFNPO_VECTORISED
#endif

namespace selfnpo {
namespace {

// Counters [begin, end) of the flattened list (sample, element / 4).
SELFNPO_VECTORISED void jump_range(const ForwardJump& op, int64_t begin, int64_t end) {
    const int64_t per_sample = (op.elements + 3) / 4;
    CounterBlock block;
    float normal[4 * kBlock];
    for (int64_t start = begin; start < end; start += kBlock) {
        const int64_t count = std::min<int64_t>(kBlock, end - start);
        bool any_noise = false;
        for (int64_t i = 0, sample = start / per_sample, quad = start % per_sample; i < kBlock; ++i) {
            const bool valid = i < count;
            block.word[0][i] = static_cast<uint32_t>(quad);
            block.word[1][i] = op.step;
            block.word[2][i] = op.site;
            block.word[3][i] = valid ? static_cast<uint32_t>(op.sample_ids[sample]) : 0;
            any_noise |= valid && op.rows[2 * sample + 1] != 0.0f;
            if (++quad == per_sample) quad = 0, ++sample;
        }
        if (any_noise) {
            philox_4x32(block, op.seed);
            box_muller(block, normal);
        }
        // Runs of counters that belong to one sample share their coefficients and lie side by side in memory.
        for (int64_t i = 0; i < count;) {
            const int64_t sample = (start + i) / per_sample, quad = (start + i) % per_sample;
            const int64_t run = std::min(count - i, per_sample - quad);
            const int64_t length = std::min(4 * run, op.elements - 4 * quad);
            const float a = op.rows[2 * sample], b = op.rows[2 * sample + 1];
            const float* x = op.sample + sample * op.elements + 4 * quad;
            const float* z = normal + 4 * i;
            float* out = op.out + sample * op.elements + 4 * quad;
            // A zero coefficient removes its operand, even an infinite one.
            if (b == 0.0f && a == 0.0f) {
                std::fill(out, out + length, 0.0f);
            } else if (b == 0.0f) {
                for (int64_t k = 0; k < length; ++k) out[k] = a * x[k];
            } else if (a == 0.0f) {
                for (int64_t k = 0; k < length; ++k) out[k] = b * z[k];
            } else {
                for (int64_t k = 0; k < length; ++k) out[k] = a * x[k] + b * z[k];
            }
            i += run;
        }
    }
}

}  // namespace

void forward_jump(const ForwardJump& op, int threads) {
    const int64_t total = op.batch * ((op.elements + 3) / 4);
    // A thread pays for itself from about 16 blocks on; ranges are whole blocks, so that the split changes no bit.
    const int64_t blocks = (total + kBlock - 1) / kBlock;
    const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(threads, blocks / 16));
    const int64_t share = (blocks + workers - 1) / workers * kBlock;
    std::vector<std::thread> others;
    for (int64_t w = 1; w < workers; ++w) {
        others.emplace_back([&op, total, share, w] { jump_range(op, w * share, std::min(total, (w + 1) * share)); });
    }
    jump_range(op, 0, std::min(total, share));
    for (std::thread& other : others) other.join();
}

}  // namespace selfnpo
