#pragma once

#include <string>
#include <vector>

#include "../adamw.h"

namespace selfnpo {

// Enqueues the update on `stream`; `step`, `lr` and `grad_scale` (may be null) are device pointers, read when it runs.
// grad_dtype is as in cpu/kernel.h. Returns CUDA's error message, or "" on success. Does not synchronise.
std::string fused_adamw_cuda(const std::vector<AdamWTensor>& tensors, int grad_dtype, const AdamWSettings& settings,
                             const int64_t* step, const float* lr, const float* grad_scale, int device, uintptr_t stream);

}  // namespace selfnpo
