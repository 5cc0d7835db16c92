// The CUDA optimizer behind a C interface.
#include <type_traits>

#include "../../../csrc/cuda/adamw.cu"

extern "C" int run(const selfnpo::AdamWTensor* tensors, int count, int grad_dtype, const double* settings,
                   const int64_t* step, const float* lr, const float* grad_scale) {
    launches = 0;
    const std::vector<selfnpo::AdamWTensor> list(tensors, tensors + count);
    const selfnpo::AdamWSettings values(settings[0], settings[1], settings[2], settings[3], settings[4]);
    const std::string error = selfnpo::fused_adamw_cuda(list, grad_dtype, values, step, lr, grad_scale, 0, 0);
    return error.empty() ? launches : -1;
}
