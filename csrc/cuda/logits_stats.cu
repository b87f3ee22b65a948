// Statistics of each row of the logits, each row read once.
#include "rows.cuh"

namespace gspo::cuda {
namespace {

constexpr double kLowest = -1e30;  // of z - max where it meets a product: 0 · -inf would be NaN

// Sums over the columns that a warp has seen, in two parts: the maximum, whose e^0 = 1 is left out so that small
// terms beside it keep their digits, is the warp's; the sums are this lane's share.
template <typename R>
struct Running {
    R max = -static_cast<R>(kInfinity);
    R exp = 0;    // sum of e^x
    R z_exp = 0;  // sum of (z - max) e^x

    // The new maximum leaves the terms, and the old one takes its place among them. Called by whole warps.
    template <int count>
    __device__ void replace_max(R (&z)[count], R lane_max, R scale) {
        const R new_max = warp_max(lane_max);
        const unsigned holders = __ballot_sync(kAllLanes, lane_max == new_max);
        bool is_holder = threadIdx.x % kLanes == static_cast<unsigned>(__ffs(static_cast<int>(holders)) - 1);
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const bool is_max = is_holder && z[i] == new_max;
            z[i] = is_max ? max : z[i];
            is_holder = is_holder && !is_max;
        }
        const R delta = larger(max - new_max, static_cast<R>(kLowest)), factor = exp2_of(delta * scale);
        z_exp = factor * (z_exp + delta * exp);
        exp *= factor;
        max = new_max;
    }

    // One comparison a batch, not one a column, decides whether there is a new maximum.
    template <int count>
    __device__ void add(R (&z)[count], R scale) {
        R lane_max = z[0];
#pragma unroll
        for (int i = 1; i < count; ++i) lane_max = larger(lane_max, z[i]);
        if (__any_sync(kAllLanes, lane_max > max)) replace_max(z, lane_max, scale);
        const R shift = without_infinity(max);
        R batch_exp = 0, batch_z_exp = 0;
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const R difference = z[i] - shift, weight = exp2_of(difference * scale);
            batch_exp += weight;
            batch_z_exp += larger(difference, static_cast<R>(kLowest)) * weight;
        }
        exp += batch_exp;
        z_exp += batch_z_exp;
    }
};

struct RowSums {
    double max;
    ExpSums sums;
};

template <typename Shape, bool is_aligned, typename T>
__device__ RowSums warp_statistics(const T* row, int64_t width, double inverse_temperature) {
    using R = Real<T>;
    constexpr double log2_e = 1.4426950408889634;
    constexpr int count = kLoads * Shape::elements;
    const R scale = static_cast<R>(inverse_temperature * log2_e);
    Running<R> running;
    const auto add = [&](const Vector<T, Shape::elements>(&loaded)[kLoads]) {
        R z[count];
#pragma unroll
        for (int i = 0; i < count; ++i) z[i] = to_real(loaded[i / Shape::elements].values[i % Shape::elements]);
        running.add(z, scale);
    };
    Vector<T, Shape::elements> loaded[kLoads];
    int64_t first = 0;
    for (; first + Shape::batch <= width; first += Shape::batch) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) load<is_aligned>(row + first + Shape::column_of(i), loaded[i]);
        add(loaded);
    }
    if (first < width) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) load_until<is_aligned>(row, first + Shape::column_of(i), width, loaded[i]);
        add(loaded);
    }
    // The maximum's own 1 comes in here, in float64.
    const double max = running.max, one = max == -kInfinity ? 0.0 : 1.0;
    return {max, {one + warp_sum(static_cast<double>(running.exp)),
                  inverse_temperature * warp_sum(static_cast<double>(running.z_exp))}};
}

// The sums of several parts of a row, one in each lane; a lane without a part holds -inf and zeros.
__device__ RowSums merge_lanes(const RowSums& part, double inverse_temperature) {
    const double max = warp_max(part.max);
    const ExpSums sums = relative_to(max, part.max, part.sums, inverse_temperature);
    return {max, {warp_sum(sums.exp), warp_sum(sums.x_exp)}};
}

__device__ void write_row(const LogitsStats& args, int64_t row, RowSums found, double target, bool is_here) {
    const Statistics& out = args.out;
    if (args.accumulate) {
        const double inverse_temperature = args.shard.inverse_temperature, max = larger(out.max[row], found.max);
        const ExpSums before{out.sum_exp[row], out.sum_x_exp[row]};
        const ExpSums a = relative_to(max, out.max[row], before, inverse_temperature);
        const ExpSums b = relative_to(max, found.max, found.sums, inverse_temperature);
        found = {max, {a.exp + b.exp, a.x_exp + b.x_exp}};
    }
    out.max[row] = found.max;
    out.sum_exp[row] = found.sums.exp;
    out.sum_x_exp[row] = found.sums.x_exp;
    if (is_here || !args.accumulate) out.target[row] = target;
}

template <typename Shape, bool is_aligned, typename T>
__global__ void __launch_bounds__(kThreads) logits_stats_kernel(const LogitsStats args) {
    __shared__ RowSums parts[2][kWarps];  // taken in turn: one barrier a row is enough
    const T* logits = static_cast<const T*>(args.logits.data);
    const int64_t width = args.shard.width;
    const double inverse_temperature = args.shard.inverse_temperature;
    const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    int turn = 0;
    for (int64_t row = Shape::first_row(); row < args.logits.rows; row += Shape::row_step(), turn = 1 - turn) {
        const T* data = logits + row * args.logits.stride;
        const int64_t column = args.targets[row] - args.shard.start;
        const bool is_here = column >= 0 && column < width, writes = Shape::thread() == 0;
        const double target = writes && is_here ? static_cast<double>(to_real(data[column])) : 0.0;
        RowSums found = warp_statistics<Shape, is_aligned>(data, width, inverse_temperature);
        if constexpr (Shape::warps_per_row > 1) {
            if (lane == 0) parts[turn][warp] = found;
            __syncthreads();
            if (warp != 0) continue;
            found = {-kInfinity, {0.0, 0.0}};
            if (lane < kWarps) found = parts[turn][lane];
            found = merge_lanes(found, inverse_temperature);
        }
        if (writes) write_row(args, row, found, target, is_here);
    }
}

}  // namespace

void logits_stats(const LogitsStats& args, void* stream) {
    const char* name = "logits_stats";
    with_element(name, args.logits.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        with_shape<T>(args.shard.width, [&](auto shape) {
            using Shape = decltype(shape);
            const int64_t work = divide_up(args.logits.rows, Shape::rows_per_block);
            if (is_aligned(args.logits, sizeof(T), 16)) {
                launch<logits_stats_kernel<Shape, true, T>>(name, work, stream, args);
            } else {
                launch<logits_stats_kernel<Shape, false, T>>(name, work, stream, args);
            }
        });
    });
}

}  // namespace gspo::cuda
