// AdamW over many tensors: clip factor, update, moving average and bfloat16 weights in one pass over memory.
//
// The table of tensors is passed by value in the kernel's parameters, so a captured graph needs no host memory later.
#include "adamw.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace selfnpo {
namespace {

constexpr int kThreads = 256, kVector = 4, kRounds = 4;
constexpr int64_t kChunk = int64_t{kThreads} * kVector * kRounds;  // elements per thread block
// As many tensors as fit in the space for parameters: 32,764 bytes from CUDA 12.1 on, 4,096 before.
constexpr int kTensors = CUDART_VERSION >= 12010 ? 440 : 52;

struct Table {
    AdamWTensor tensor[kTensors];
    int32_t first_block[kTensors + 1];
    int32_t count;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <typename T>
struct alignas(sizeof(T) * kVector) Pack {
    T value[kVector];
};

// Four neighbouring values; `whole` says that all four exist and are aligned.
template <typename T>
__device__ __forceinline__ Pack<T> load(const T* data, int64_t at, int64_t count, bool whole) {
    if (whole) return *reinterpret_cast<const Pack<T>*>(data + at);
    Pack<T> pack{};
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
        if (k < count) pack.value[k] = data[at + k];
    }
    return pack;
}

template <typename T>
__device__ __forceinline__ void store(T* data, int64_t at, int64_t count, bool whole, const Pack<T>& pack) {
    if (whole) {
        *reinterpret_cast<Pack<T>*>(data + at) = pack;
        return;
    }
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
        if (k < count) data[at + k] = pack.value[k];
    }
}

template <bool kSplit>
struct Weights {
    Pack<float> value;

    __device__ __forceinline__ void load(const void* data, const int16_t* low, int64_t at, int64_t count, bool whole) {
        if constexpr (kSplit) {
            const Pack<uint16_t> highs = selfnpo::load(static_cast<const uint16_t*>(data), at, count, whole);
            const Pack<int16_t> lows = selfnpo::load(low, at, count, whole);
#pragma unroll
            for (int k = 0; k < kVector; ++k) value.value[k] = join(highs.value[k], lows.value[k]);
        } else {
            value = selfnpo::load(static_cast<const float*>(data), at, count, whole);
        }
    }

    __device__ __forceinline__ void store(void* data, int16_t* low, int64_t at, int64_t count, bool whole) const {
        if constexpr (kSplit) {
            Pack<uint16_t> highs;
            Pack<int16_t> lows;
#pragma unroll
            for (int k = 0; k < kVector; ++k) split(value.value[k], highs.value[k], lows.value[k]);
            selfnpo::store(static_cast<uint16_t*>(data), at, count, whole, highs);
            selfnpo::store(low, at, count, whole, lows);
        } else {
            selfnpo::store(static_cast<float*>(data), at, count, whole, value);
        }
    }
};

__device__ __forceinline__ bool aligned(const void* pointer, int bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <typename Grad, bool kSplit>
__global__ void __launch_bounds__(kThreads) update(const __grid_constant__ Table table, const AdamWSettings settings,
                                                   const int64_t* step, const float* lr, const float* grad_scale) {
    int low = 0, high = table.count;  // the tensor whose blocks include this one
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (static_cast<int>(blockIdx.x) < table.first_block[middle] ? high : low) = middle;
    }
    const AdamWTensor& tensor = table.tensor[low];
    const int64_t begin = (blockIdx.x - table.first_block[low]) * kChunk;
    const Grad* grad = static_cast<const Grad*>(tensor.grad);
    constexpr int kWeightBytes = kVector * (kSplit ? 2 : 4);
    const bool vectors = aligned(tensor.param, kWeightBytes) && aligned(tensor.low, kWeightBytes) &&
                         aligned(tensor.ema, kWeightBytes) && aligned(tensor.ema_low, kWeightBytes) &&
                         aligned(tensor.exp_avg, 16) && aligned(tensor.exp_avg_sq, 16) &&
                         aligned(grad, kVector * sizeof(Grad));

    __shared__ AdamWStep shared;
    if (threadIdx.x == 0) shared = adamw_step(settings, *step, *lr, grad_scale ? *grad_scale : 1.0f);
    __syncthreads();
    const AdamWStep now = shared;

#pragma unroll 2
    for (int round = 0; round < kRounds; ++round) {
        const int64_t at = begin + (int64_t{round} * kThreads + threadIdx.x) * kVector;
        const int64_t count = tensor.elements - at;
        if (count <= 0) return;
        const bool whole = vectors && count >= kVector;
        // All loads come first, so that their latencies overlap.
        Weights<kSplit> param, ema;
        param.load(tensor.param, tensor.low, at, count, whole);
        const Pack<Grad> grads = load(grad, at, count, whole);
        Pack<float> exp_avg = load(tensor.exp_avg, at, count, whole);
        Pack<float> exp_avg_sq = load(tensor.exp_avg_sq, at, count, whole);
        if (tensor.ema) ema.load(tensor.ema, tensor.ema_low, at, count, whole);
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
            adamw(param.value.value[k], exp_avg.value[k], exp_avg_sq.value[k], to_float(grads.value[k]), now);
        }
        param.store(tensor.param, tensor.low, at, count, whole);
        store(tensor.exp_avg, at, count, whole, exp_avg);
        store(tensor.exp_avg_sq, at, count, whole, exp_avg_sq);
        if (tensor.ema) {
#pragma unroll
            for (int k = 0; k < kVector; ++k) {
                ema.value.value[k] += now.ema_weight * (param.value.value[k] - ema.value.value[k]);
            }
            ema.store(tensor.ema, tensor.ema_low, at, count, whole);
        }
    }
}

using Kernel = void (*)(const Table, const AdamWSettings, const int64_t*, const float*, const float*);

Kernel kernel_for(int grad_dtype, bool split) {
    switch (grad_dtype) {
        case 0:
            return split ? update<float, true> : update<float, false>;
        case 1:
            return split ? update<__nv_bfloat16, true> : update<__nv_bfloat16, false>;
        default:
            return split ? update<__half, true> : update<__half, false>;
    }
}

}  // namespace

std::string fused_adamw_cuda(const std::vector<AdamWTensor>& tensors, int grad_dtype, const AdamWSettings& settings,
                             const int64_t* step, const float* lr, const float* grad_scale, int device, uintptr_t stream) {
    int before = 0;
    cudaError_t error = cudaGetDevice(&before);
    if (error == cudaSuccess) error = cudaSetDevice(device);
    size_t next = 0;
    while (error == cudaSuccess && next < tensors.size()) {
        Table table;
        table.count = 0;
        int64_t blocks = 0;
        for (; next < tensors.size() && table.count < kTensors; ++next) {
            const int64_t more = (tensors[next].elements + kChunk - 1) / kChunk;
            if (blocks + more > INT32_MAX) break;
            table.tensor[table.count] = tensors[next];
            table.first_block[table.count++] = static_cast<int32_t>(blocks);
            blocks += more;
        }
        if (table.count == 0) error = cudaErrorInvalidConfiguration;  // one parameter needs more blocks than a grid has
        if (error != cudaSuccess || blocks == 0) continue;
        AdamWSettings by_value = settings;
        void* arguments[] = {&table, &by_value, &step, &lr, &grad_scale};
        error = cudaLaunchKernel(kernel_for(grad_dtype, tensors.front().low != nullptr), dim3(static_cast<unsigned>(blocks)),
                                 dim3(kThreads), arguments, 0, reinterpret_cast<cudaStream_t>(stream));
    }
    cudaSetDevice(before);
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace selfnpo
