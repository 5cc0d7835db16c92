"""A kernel that stores the words which the ops only use."""

import triton
import triton.language as tl

from selfnpo_kernels.triton_kernels.forward_jump import philox_4x32


@triton.jit
def words_kernel(out, counters, seed, step, site, sample_id):
    lane = tl.arange(0, 4)
    word0, word1, word2, word3 = philox_4x32(tl.load(counters + lane).to(tl.uint32), seed, step, site, tl.load(sample_id))
    tl.store(out + lane * 4, word0.to(tl.int64))
    tl.store(out + lane * 4 + 1, word1.to(tl.int64))
    tl.store(out + lane * 4 + 2, word2.to(tl.int64))
    tl.store(out + lane * 4 + 3, word3.to(tl.int64))
