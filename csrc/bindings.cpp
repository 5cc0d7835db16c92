// The Python module selfnpo_kernels._C. It knows no torch: pointers, sizes and counts come in as integers, and the callers
// in selfnpo_kernels check them.
#include <pybind11/pybind11.h>

#include "cpu/forward_jump.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
    module.attr("compiler") = SELFNPO_COMPILER;
    module.def(
        "forward_jump",
        [](uintptr_t out, uintptr_t sample, uintptr_t rows, uintptr_t sample_ids, int64_t batch, int64_t elements,
           uint64_t seed, uint32_t step, uint32_t site, int threads) {
            const selfnpo::ForwardJump op{reinterpret_cast<float*>(out),
                                          reinterpret_cast<const float*>(sample),
                                          reinterpret_cast<const float*>(rows),
                                          reinterpret_cast<const int64_t*>(sample_ids),
                                          batch,
                                          elements,
                                          seed,
                                          step,
                                          site};
            py::gil_scoped_release unlocked;
            selfnpo::forward_jump(op, threads);
        },
        py::arg("out"), py::arg("sample"), py::arg("rows"), py::arg("sample_ids"), py::kw_only(), py::arg("batch"),
        py::arg("elements"), py::arg("seed"), py::arg("step"), py::arg("site"), py::arg("threads"));
}
