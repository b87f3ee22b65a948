// The part of CUDA that csrc/cuda uses, on one CPU thread: g++ compiles the kernels' own sources against it, so that
// their logic is tested where there is no GPU. Speed, registers and memory traffic are not emulated.
//
// A block's threads are fibers. Each warp runs as far as it gets before the next one does, in turn from the first warp
// and from the last, so that a missing barrier shows as a wrong result. A block whose fibers all wait for one that
// never comes is an error.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // blocks run one after another
#define __launch_bounds__(threads)

using std::isfinite;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

// --- fibers --------------------------------------------------------------------------------------------------

namespace emulation {

constexpr unsigned kWarpSize = 32;
constexpr size_t kStackBytes = 256 * 1024;

struct Barrier {
    unsigned size = 0, arrived = 0, passed = 0;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    bool is_done = false;
};

struct Warp {
    Barrier barrier;
    alignas(16) char values[kWarpSize][16];  // what each lane shows the others
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block_barrier;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline uint64_t progress;  // barriers passed and fibers done
inline unsigned grid_blocks = 2;  // blocks that the "device" holds: few, so that kernels loop

inline void run_body() {
    body();
    fibers[threadIdx.x].is_done = true;
    ++progress;
}

inline void wait(Barrier& barrier) {
    const unsigned before = barrier.passed;
    if (++barrier.arrived == barrier.size) {
        barrier.arrived = 0;
        ++barrier.passed;
        ++progress;
        return;
    }
    while (barrier.passed == before) swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

inline void run_block() {
    const unsigned threads = blockDim.x;
    if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
    warps.assign(threads / kWarpSize, Warp{});
    for (Warp& warp : warps) warp.barrier.size = kWarpSize;
    block_barrier = {threads, 0, 0};
    for (unsigned i = 0; i < threads; ++i) {
        fibers[i].is_done = false;
        getcontext(&fibers[i].context);
        fibers[i].context.uc_stack.ss_sp = fibers[i].stack.get();
        fibers[i].context.uc_stack.ss_size = kStackBytes;
        fibers[i].context.uc_link = &scheduler;
        makecontext(&fibers[i].context, run_body, 0);
    }
    unsigned running = threads;
    for (unsigned round = 0; running > 0; ++round) {
        const uint64_t before_round = progress;
        for (unsigned i = 0; i < warps.size(); ++i) {
            const unsigned first = (round % 2 == 0 ? i : unsigned(warps.size()) - 1 - i) * kWarpSize;
            uint64_t before = progress - 1;
            while (progress != before) {  // as far as the warp gets
                before = progress;
                for (threadIdx.x = first; threadIdx.x < first + kWarpSize; ++threadIdx.x) {
                    Fiber& fiber = fibers[threadIdx.x];
                    if (fiber.is_done) continue;
                    swapcontext(&scheduler, &fiber.context);
                    running -= fiber.is_done;
                }
            }
        }
        if (running > 0 && progress == before_round) {
            std::fprintf(stderr, "block %u: threads wait for others that never come\n", blockIdx.x);
            std::abort();
        }
    }
}

// Shows `value` to the warp and returns what `lane` shows, by f(values).
template <typename T, typename F>
auto exchange(T value, F f) {
    static_assert(sizeof(T) <= 16);
    Warp& warp = warps[threadIdx.x / kWarpSize];
    std::memcpy(warp.values[threadIdx.x % kWarpSize], &value, sizeof(T));
    wait(warp.barrier);
    const auto result = f([&](unsigned lane) {
        T shown;
        std::memcpy(&shown, warp.values[lane], sizeof(T));
        return shown;
    });
    wait(warp.barrier);
    return result;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::block_barrier); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulation::exchange(value, [&](auto shown) { return shown(threadIdx.x % emulation::kWarpSize ^ mask); });
}

inline unsigned __ballot_sync(unsigned, bool value) {
    return emulation::exchange(value, [](auto shown) {
        unsigned result = 0;
        for (unsigned lane = 0; lane < emulation::kWarpSize; ++lane) result |= unsigned(shown(lane)) << lane;
        return result;
    });
}

inline bool __any_sync(unsigned lanes, bool value) { return __ballot_sync(lanes, value) != 0; }
inline int __ffs(int value) { return __builtin_ffs(value); }

// --- memory and element types ----------------------------------------------------------------------------------

template <typename T>
T __ldcs(const T* from) {
    if (reinterpret_cast<uintptr_t>(from) % sizeof(T) != 0) std::abort();  // as a GPU would
    T value;
    std::memcpy(&value, from, sizeof(T));
    return value;
}

template <typename T>
void __stcs(T* to, T value) {
    if (reinterpret_cast<uintptr_t>(to) % sizeof(T) != 0) std::abort();
    std::memcpy(to, &value, sizeof(T));
}

struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (value != value) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __double2bfloat16(double value) { return __float2bfloat16_rn(float(value)); }

using __half = _Float16;
inline float __half2float(__half value) { return value; }
inline __half __float2half_rn(float value) { return __half(value); }
inline __half __double2half(double value) { return __half(value); }

// --- the host's side -------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 1, cudaSuccess; }

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
    return *blocks = int(emulation::grid_blocks), cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... args) {
    gridDim = config->gridDim;
    blockDim = config->blockDim;
    emulation::body = [&] { kernel(args...); };
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) emulation::run_block();
    return cudaSuccess;
}
