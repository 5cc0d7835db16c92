// The Python module selfnpo_kernels._C. It does not depend on torch: tensors are passed as (address, dtype code), sizes and
// counts as integers. The callers in selfnpo_kernels check them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <utility>

#include "cpu/ops.h"
#ifdef SELFNPO_CUDA_ARCHITECTURES
#include "cuda/adamw.h"
#endif

namespace py = pybind11;
using namespace selfnpo;

namespace {

using Address = uintptr_t;
using Typed = std::pair<Address, int>;

Tensor output(Typed tensor) { return {reinterpret_cast<void*>(tensor.first), static_cast<Dtype>(tensor.second)}; }
ConstTensor input(Typed tensor) { return {reinterpret_cast<const void*>(tensor.first), static_cast<Dtype>(tensor.second)}; }
Rows rows_of(std::pair<Address, int64_t> rows) { return {reinterpret_cast<const float*>(rows.first), rows.second}; }

// One tuple per tensor: param, low, grad, exp_avg, exp_avg_sq, ema, ema_low (addresses, 0 if absent), elements.
using AdamWAddresses = std::tuple<Address, Address, Address, Address, Address, Address, Address, int64_t>;

std::vector<AdamWTensor> adamw_tensors(const std::vector<AdamWAddresses>& addresses) {
    std::vector<AdamWTensor> tensors;
    for (const auto& [param, low, grad, exp_avg, exp_avg_sq, ema, ema_low, elements] : addresses) {
        tensors.push_back({reinterpret_cast<void*>(param), reinterpret_cast<int16_t*>(low),
                           reinterpret_cast<const void*>(grad), reinterpret_cast<float*>(exp_avg),
                           reinterpret_cast<float*>(exp_avg_sq), reinterpret_cast<void*>(ema),
                           reinterpret_cast<int16_t*>(ema_low), elements});
    }
    return tensors;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.attr("compiler") = SELFNPO_COMPILER;
#ifdef SELFNPO_CUDA_ARCHITECTURES
    module.attr("cuda_architectures") = SELFNPO_CUDA_ARCHITECTURES;
#else
    module.attr("cuda_architectures") = "";
#endif

    using unlocked = py::call_guard<py::gil_scoped_release>;
    module.def(
        "guided_step",
        [](Typed prev_sample, Typed pred_original_sample, Typed sample, Typed cond, Typed uncond,
           std::pair<Address, int64_t> rows, float guidance_scale, int64_t batch, int64_t elements, int threads) {
            guided_step({output(prev_sample), output(pred_original_sample), input(sample), input(cond), input(uncond),
                         rows_of(rows), guidance_scale, batch, elements},
                        threads);
        },
        unlocked());
    module.def(
        "cfg_combine",
        [](Typed out, Typed model_output, float guidance_scale, float guidance_rescale, int64_t batch, int64_t elements,
           int threads) {
            cfg_combine({output(out), input(model_output), guidance_scale, guidance_rescale, batch, elements}, threads);
        },
        unlocked());
    module.def(
        "forward_jump",
        [](Typed out, Typed sample, std::pair<Address, int64_t> rows, Address sample_ids, int64_t batch, int64_t channels,
           int64_t positions, uint64_t seed, uint32_t step, uint32_t site, int threads) {
            forward_jump({output(out), input(sample), rows_of(rows), reinterpret_cast<const int64_t*>(sample_ids), batch,
                          channels, positions, seed, step, site},
                         threads);
        },
        unlocked());
    module.def(
        "x0_loss",
        [](Typed sample, Typed model_output, Typed target, std::pair<Address, int64_t> rows, bool huber, float huber_c,
           int64_t batch, int64_t elements, int threads) {
            return x0_loss(
                {input(sample), input(model_output), input(target), rows_of(rows), huber, huber_c, batch, elements},
                threads);
        },
        unlocked());
    module.def(
        "x0_loss_backward",
        [](Typed grad, float scale, int operand, Typed sample, Typed model_output, Typed target,
           std::pair<Address, int64_t> rows, bool huber, float huber_c, int64_t batch, int64_t elements, int threads) {
            x0_loss_backward(
                {input(sample), input(model_output), input(target), rows_of(rows), huber, huber_c, batch, elements},
                output(grad), scale, operand, threads);
        },
        unlocked());
    module.def(
        "fused_adamw",
        [](const std::vector<AdamWAddresses>& addresses, int grad_dtype, double beta1, double beta2, double eps,
           double weight_decay, double ema_decay, int64_t step, float lr, float grad_scale, int threads) {
            const AdamWStep now = adamw_step({beta1, beta2, eps, weight_decay, ema_decay}, step, lr, grad_scale);
            fused_adamw(adamw_tensors(addresses), static_cast<Dtype>(grad_dtype), now, threads);
        },
        unlocked());
#ifdef SELFNPO_CUDA_ARCHITECTURES
    module.def(
        "fused_adamw_cuda",
        [](const std::vector<AdamWAddresses>& addresses, int grad_dtype, double beta1, double beta2, double eps,
           double weight_decay, double ema_decay, Address step, Address lr, Address grad_scale, int device, Address stream) {
            const std::string error =
                fused_adamw_cuda(adamw_tensors(addresses), grad_dtype, {beta1, beta2, eps, weight_decay, ema_decay},
                                 reinterpret_cast<const int64_t*>(step), reinterpret_cast<const float*>(lr),
                                 reinterpret_cast<const float*>(grad_scale), device, stream);
            if (!error.empty()) throw std::runtime_error("fused_adamw_ on CUDA: " + error);
        },
        unlocked());
#endif
}
