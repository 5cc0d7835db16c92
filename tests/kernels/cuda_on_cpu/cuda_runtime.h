// As much of CUDA as csrc/cuda needs, on the CPU: thread after thread, block after block. Barriers do nothing, so it serves
// kernels whose first thread prepares what the others read.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __grid_constant__

struct dim3 {
    unsigned x;
    explicit dim3(unsigned count) : x(count) {}
};
inline thread_local dim3 blockIdx(0), threadIdx(0);
inline void __syncthreads() {}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

inline int launches = 0;

template <typename A, typename B, typename C, typename D, typename E>
cudaError_t cudaLaunchKernel(void (*kernel)(A, B, C, D, E), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
    ++launches;
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) {
            kernel(*static_cast<std::remove_const_t<A>*>(arguments[0]), *static_cast<std::remove_const_t<B>*>(arguments[1]),
                   *static_cast<C*>(arguments[2]), *static_cast<D*>(arguments[3]), *static_cast<E*>(arguments[4]));
        }
    }
    return cudaSuccess;
}

struct __nv_bfloat16 {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 value) {
    const uint32_t bits = uint32_t{value.bits} << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

struct __half {
    uint16_t bits;
};
inline float __half2float(__half value) {  // of finite numbers
    const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
    const float magnitude = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(1.0f * fraction, -24);
    return value.bits & 0x8000 ? -magnitude : magnitude;
}
