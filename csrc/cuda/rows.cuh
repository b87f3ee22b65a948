// How the kernels over logits walk a row: which threads share it, and which columns each of them takes.
#pragma once

#include "common.cuh"

namespace gspo::cuda {
namespace {

// A short row has a warp to itself, without a barrier; a long one the whole block. The choice depends on the row's
// length alone, and the columns a thread takes do not depend on alignment: a row has one result, wherever it lies.
constexpr int64_t kLongRowBytes = 32768;
constexpr int kLoads = 4;  // 16-byte loads that a thread has in flight

template <typename T, int warps_per_row_>
struct RowShape {
    static constexpr int warps_per_row = warps_per_row_;
    static constexpr int threads_per_row = warps_per_row * kLanes;
    static constexpr int rows_per_block = kThreads / threads_per_row;
    static constexpr int elements = 16 / sizeof(T);                             // of one load
    static constexpr int64_t batch = int64_t(kLoads) * threads_per_row * elements;  // columns of one round

    __device__ static int64_t first_row() {
        return int64_t(blockIdx.x) * rows_per_block + threadIdx.x / threads_per_row;
    }
    __device__ static int64_t row_step() { return int64_t(gridDim.x) * rows_per_block; }
    __device__ static int thread() { return threadIdx.x % threads_per_row; }
    __device__ static bool takes(int64_t column) { return column / elements % threads_per_row == thread(); }
    __device__ static int64_t column_of(int load) { return (load * threads_per_row + thread()) * elements; }
};

// f(shape) with the shape that rows of `width` columns have.
template <typename T, typename F>
void with_shape(int64_t width, F f) {
    if (width * int64_t(sizeof(T)) >= kLongRowBytes) {
        f(RowShape<T, kWarps>{});
    } else {
        f(RowShape<T, 1>{});
    }
}

// The columns from `first` on that lie before `width`, with -inf for the rest.
template <bool is_aligned, typename T, int count>
__device__ inline void load_until(const T* row, int64_t first, int64_t width, Vector<T, count>& to) {
    if (first + count <= width) {
        load<is_aligned>(row + first, to);
        return;
    }
    for (int i = 0; i < count; ++i) {
        if (first + i < width) {
            to.values[i] = row[first + i];
        } else {
            assign(to.values[i], -static_cast<Real<T>>(kInfinity));
        }
    }
}

template <bool is_aligned, typename T, int count>
__device__ inline void store_until(T* row, int64_t first, int64_t width, const Vector<T, count>& from) {
    if (first + count <= width) {
        store<is_aligned>(row + first, from);
        return;
    }
    for (int i = 0; i < count; ++i) {
        if (first + i < width) row[first + i] = from.values[i];
    }
}

}  // namespace
}  // namespace gspo::cuda
