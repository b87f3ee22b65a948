// What the kernels share: launches on a grid that fits the device, sums in a fixed order, wide loads and stores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "launchers.h"

namespace gspo::cuda {
namespace {

constexpr int kThreads = 256;  // of a block, in every kernel
constexpr int kLanes = 32;
constexpr int kWarps = kThreads / kLanes;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// --- launching -----------------------------------------------------------------------------------------------

inline void check(cudaError_t error, const char* operation) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // reported here: the next caller must not find it
    throw std::runtime_error(std::string(operation) + ": " + cudaGetErrorString(error));
}

// Blocks of the kernel that the current device holds at once; asked once for each device.
template <auto kernel>
int64_t resident_blocks(const char* operation) {
    constexpr int known_devices = 64;
    static std::atomic<int> known[known_devices];
    int device = 0;
    check(cudaGetDevice(&device), operation);
    int blocks = device < known_devices ? known[device].load(std::memory_order_relaxed) : 0;
    if (blocks == 0) {
        int multiprocessors = 0, each = 0;
        check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), operation);
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0), operation);
        blocks = std::max(multiprocessors * each, 1);
        if (device < known_devices) known[device].store(blocks, std::memory_order_relaxed);
    }
    return blocks;
}

// `work` is the number of blocks that would do everything in one go; the kernel loops where fewer fit.
template <auto kernel, typename Arguments>
void launch(const char* operation, int64_t work, void* stream, const Arguments& arguments) {
    if (work <= 0) return;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(std::min(work, resident_blocks<kernel>(operation))));
    config.blockDim = dim3(kThreads);
    config.stream = static_cast<cudaStream_t>(stream);
    check(cudaLaunchKernelEx(&config, kernel, arguments), operation);
}

constexpr int64_t divide_up(int64_t count, int64_t by) { return (count + by - 1) / by; }

// --- element types -------------------------------------------------------------------------------------------

template <typename T>
struct Type {
    using type = T;
};

template <typename F>
void with_element(const char* operation, Dtype dtype, F f) {
    switch (dtype) {
        case Dtype::float64: return f(Type<double>{});
        case Dtype::float32: return f(Type<float>{});
        case Dtype::bfloat16: return f(Type<__nv_bfloat16>{});
        case Dtype::float16: return f(Type<__half>{});
    }
    throw std::runtime_error(std::string(operation) + ": unknown dtype");
}

template <typename F>
void with_real(const char* operation, Dtype dtype, F f) {
    if (dtype == Dtype::float64) return f(Type<double>{});
    if (dtype == Dtype::float32) return f(Type<float>{});
    throw std::runtime_error(std::string(operation) + ": values must be float32 or float64");
}

__device__ inline double to_real(double value) { return value; }
__device__ inline float to_real(float value) { return value; }
__device__ inline float to_real(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_real(__half value) { return __half2float(value); }

template <typename T>
using Real = decltype(to_real(T{}));  // what an element is computed in

__device__ inline void assign(double& to, double value) { to = value; }
__device__ inline void assign(float& to, double value) { to = static_cast<float>(value); }
__device__ inline void assign(float& to, float value) { to = value; }
__device__ inline void assign(__nv_bfloat16& to, float value) { to = __float2bfloat16_rn(value); }
__device__ inline void assign(__nv_bfloat16& to, double value) { to = __double2bfloat16(value); }
__device__ inline void assign(__half& to, float value) { to = __float2half_rn(value); }
__device__ inline void assign(__half& to, double value) { to = __double2half(value); }

// 2^x to two units in the last place, 0 below the smallest normal number.
__device__ inline float exp2_of(float x) {
#ifdef __CUDA_ARCH__
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return std::exp2(x);
#endif
}
__device__ inline double exp2_of(double x) { return exp2(x); }

__device__ inline float larger(float a, float b) { return fmaxf(a, b); }  // of a NaN and a number, the number
__device__ inline double larger(double a, double b) { return fmax(a, b); }

// --- memory --------------------------------------------------------------------------------------------------

template <typename T, int count>
struct alignas(sizeof(T) * count) Vector {
    T values[count];
};

template <int bytes>
struct WordOf;
template <>
struct WordOf<16> {
    using type = uint4;
};
template <>
struct WordOf<8> {
    using type = uint2;
};

// Streaming: what is read or written once must not push anything else out of the caches.
template <bool is_aligned, typename T, int count>
__device__ inline void load(const T* from, Vector<T, count>& to) {
    if constexpr (is_aligned) {
        using Word = typename WordOf<sizeof(T) * count>::type;
        const Word word = __ldcs(reinterpret_cast<const Word*>(from));
        memcpy(&to, &word, sizeof(word));
    } else {
        for (int i = 0; i < count; ++i) to.values[i] = from[i];
    }
}

template <bool is_aligned, typename T, int count>
__device__ inline void store(T* to, const Vector<T, count>& from) {
    if constexpr (is_aligned) {
        using Word = typename WordOf<sizeof(T) * count>::type;
        Word word;
        memcpy(&word, &from, sizeof(word));
        __stcs(reinterpret_cast<Word*>(to), word);
    } else {
        for (int i = 0; i < count; ++i) to[i] = from.values[i];
    }
}

// Whether vectors of so many bytes may be used in every row.
inline bool is_aligned(const Matrix& matrix, int64_t element_bytes, int64_t vector_bytes) {
    return reinterpret_cast<uintptr_t>(matrix.data) % vector_bytes == 0 &&
           matrix.stride * element_bytes % vector_bytes == 0;
}

// --- sums in a fixed order -----------------------------------------------------------------------------------

template <typename T>
__device__ inline T warp_sum(T value) {  // the same in every lane
    for (int step = kLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
    return value;
}

template <typename T>
__device__ inline T warp_max(T value) {
    for (int step = kLanes / 2; step > 0; step /= 2) value = larger(value, __shfl_xor_sync(kAllLanes, value, step));
    return value;
}

template <typename T, typename WarpReduce, typename Combine>
__device__ inline T block_reduce(T value, WarpReduce warp_reduce, Combine combine) {  // the same in every thread
    __shared__ T parts[kWarps];
    value = warp_reduce(value);
    if (threadIdx.x % kLanes == 0) parts[threadIdx.x / kLanes] = value;
    __syncthreads();
    T result = parts[0];
    for (int warp = 1; warp < kWarps; ++warp) result = combine(result, parts[warp]);
    __syncthreads();  // the next reduction uses the same memory
    return result;
}

template <typename T>
__device__ inline T block_sum(T value) {
    return block_reduce(value, [](T x) { return warp_sum(x); }, [](T a, T b) { return a + b; });
}

__device__ inline double block_max(double value) {
    return block_reduce(value, [](double x) { return warp_max(x); }, [](double a, double b) { return larger(a, b); });
}

// --- rows of a softmax ---------------------------------------------------------------------------------------

// A row whose columns are all -inf is shifted by 0, so that it has no -inf - (-inf).
template <typename T>
__device__ inline T without_infinity(T max) {
    return max == -static_cast<T>(kInfinity) ? T(0) : max;
}

struct ExpSums {
    double exp, x_exp;  // sum of e^x and of x e^x
};

// The sums relative to another maximum, at least as large. NaN stays NaN.
__device__ inline ExpSums relative_to(double max, double old_max, ExpSums sums, double inverse_temperature) {
    constexpr double lowest = -1e4;  // e^lowest is 0, and so is its product with lowest; with -inf it would be NaN
    const double delta = (old_max - without_infinity(max)) * inverse_temperature;
    const double bounded = delta < lowest ? lowest : delta, scale = exp(bounded);
    return {scale * sums.exp, scale * (sums.x_exp + bounded * sums.exp)};
}

// --- packed sequences ----------------------------------------------------------------------------------------

struct Span {
    int64_t begin, end;
};

// Where a sequence lies, never outside [0, T] whatever cu_seqlens holds.
__device__ inline Span span_of(const Pack& pack, int64_t sequence) {
    const auto bounded = [&](int64_t low, int64_t value) {
        return value < low ? low : (value > pack.num_tokens ? pack.num_tokens : value);
    };
    const int64_t begin = bounded(0, pack.cu_seqlens[sequence]);
    return {begin, bounded(begin, pack.cu_seqlens[sequence + 1])};
}

// f(t) for every token outside all sequences.
template <typename F>
__device__ inline void each_token_outside(const Pack& pack, F f) {
    const int64_t last = pack.num_sequences - 1;
    const int64_t begin = last < 0 ? 0 : span_of(pack, 0).begin, end = last < 0 ? 0 : span_of(pack, last).end;
    const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, step = int64_t(gridDim.x) * kThreads;
    for (int64_t t = first; t < begin; t += step) f(t);
    for (int64_t t = end + first; t < pack.num_tokens; t += step) f(t);
}

struct ResponseSums {
    double sum, num_tokens;
};

// Sums over a sequence's response tokens of values - subtrahend, subtracted token by token: a difference of sums is
// 200 times worse. What other tokens hold is not read. The same in every thread of the block.
template <typename T>
__device__ inline ResponseSums response_sums(const Pack& pack, Span span, const T* values, const T* subtrahend) {
    double sum = 0.0, count = 0.0;
    for (int64_t t = span.begin + threadIdx.x; t < span.end; t += kThreads) {
        if (!pack.response_mask[t]) continue;
        const double value = values[t];
        sum += subtrahend == nullptr ? value : value - static_cast<double>(subtrahend[t]);
        count += 1.0;
    }
    return {block_sum(sum), block_sum(count)};
}

}  // namespace
}  // namespace gspo::cuda
