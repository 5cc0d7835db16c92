// x_s = a x_t + b z. The noise z is drawn where it is used, so each element is read once and written once.
#include "ops.h"
#include "philox_words.h"

namespace selfnpo {
namespace {

// Four normals for each of `count` counters, side by side.
SELFNPO_VECTORISED void box_muller_block(float* __restrict normal, const Words& word, int64_t count) {
    float plane[4][kCounters];
    for (int pair = 0; pair < 4; pair += 2) {
        for (int64_t i = 0; i < count; ++i) {
            box_muller(word[pair][i], word[pair + 1][i], plane[pair][i], plane[pair + 1][i]);
        }
    }
    for (int64_t i = 0; i < count; ++i) {
        for (int k = 0; k < 4; ++k) normal[4 * i + k] = plane[k][i];
    }
}

}  // namespace

void forward_jump(const ForwardJump& op, int threads) {
    const int64_t channels = op.channels, elements = channels * op.positions;
    prepare_output(op.out, op.batch * elements);
    // With channels last in memory, a block is a run of positions with all their channels. A channel's run may begin inside
    // one counter's four elements and end inside another's, so a block has four positions less.
    const int64_t length = channels == 1 ? kBlock : std::clamp<int64_t>(16 * kBlock / channels, 16, kBlock - 4);
    const auto block = [&](int64_t sample, int64_t begin, int64_t count) {
        const float a = op.rows[sample][0], b = op.rows[sample][1];
        const int64_t at = sample * elements + begin * channels;
        float normal[kBlock];
        const auto draw_run = [&](int64_t channel) {
            const int64_t logical = channel * op.positions + begin, skip = logical % 4;
            if (b != 0.0f) {
                const Counters at = {static_cast<uint32_t>(logical / 4), op.step, op.site,
                                     static_cast<uint32_t>(op.sample_ids[sample]), op.seed};
                const int64_t counters = ((skip + count + 3) / 4 + 15) / 16 * 16;
                Words word;
                philox_words(at, counters, word);
                box_muller_block(normal, word, counters);
            }
            return normal + skip;
        };
        if (channels == 1) {
            Buffer x_buffer, out_buffer;
            const float* x = a == 0.0f ? nullptr : read(op.sample, at, count, x_buffer);
            affine(target(op.out, at, out_buffer), a, x, b, draw_run(0), count);
            finish(op.out, at, count, out_buffer);
            return;
        }
        std::vector<float> x_tile(count * channels), out_tile(count * channels);
        const float* x = a == 0.0f ? nullptr : read(op.sample, at, count * channels, x_tile.data());
        float* out = target(op.out, at, out_tile.data());
        for (int64_t channel = 0; channel < channels; ++channel) {
            const float* z = draw_run(channel);
            for (int64_t i = 0; i < count; ++i) {
                const int64_t k = i * channels + channel;
                out[k] = term(a, x[k]) + term(b, z[i]);
            }
        }
        finish(op.out, at, count * channels, out_tile.data());
    };
    for_each_block(op.batch, op.positions, threads, block, length);
}

}  // namespace selfnpo
