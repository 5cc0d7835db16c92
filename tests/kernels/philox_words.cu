// Reads lines of six words (counter, key) and prints the four words that philox.h makes of each. Compiled as C++ it runs on
// the host; by nvcc on the GPU, or on the host where there is none.
#include <cstdio>
#include <vector>

#include "philox.h"

struct Case {
    uint32_t counter[4], key[2];
};

#ifdef __CUDACC__
__global__ void on_device(Case* cases, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    uint32_t* c = cases[i].counter;
    selfnpo::philox_4x32(c[0], c[1], c[2], c[3], cases[i].key[0], cases[i].key[1]);
}
#endif

static bool run_on_device([[maybe_unused]] std::vector<Case>& cases) {
#ifdef __CUDACC__
    Case* memory;
    const size_t bytes = cases.size() * sizeof(Case);
    if (cudaMalloc(&memory, bytes) != cudaSuccess) return false;
    cudaMemcpy(memory, cases.data(), bytes, cudaMemcpyHostToDevice);
    on_device<<<(cases.size() + 127) / 128, 128>>>(memory, static_cast<int>(cases.size()));
    return cudaMemcpy(cases.data(), memory, bytes, cudaMemcpyDeviceToHost) == cudaSuccess;
#else
    return false;
#endif
}

int main() {
    std::vector<Case> cases;
    Case c;
    while (std::scanf("%u %u %u %u %u %u", &c.counter[0], &c.counter[1], &c.counter[2], &c.counter[3], &c.key[0],
                      &c.key[1]) == 6) {
        cases.push_back(c);
    }
    if (!run_on_device(cases)) {
        for (Case& one : cases) {
            uint32_t* w = one.counter;
            selfnpo::philox_4x32(w[0], w[1], w[2], w[3], one.key[0], one.key[1]);
        }
    }
    for (const Case& one : cases) {
        std::printf("%u %u %u %u\n", one.counter[0], one.counter[1], one.counter[2], one.counter[3]);
    }
}
