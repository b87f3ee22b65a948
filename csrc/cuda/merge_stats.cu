// What this rank adds to the sums of each row, relative to the maximum over all ranks: a thread a row.
#include "common.cuh"

namespace gspo::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) merge_stats_kernel(const MergeStats args) {
    const int64_t rows = args.num_rows, step = int64_t(gridDim.x) * kThreads;
    const double inverse_temperature = args.shard.inverse_temperature;
    for (int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x; row < rows; row += step) {
        const double max = args.max[row];
        const ExpSums local{args.local.sum_exp[row], args.local.sum_x_exp[row]};
        const ExpSums sums = relative_to(max, args.local.max[row], local, inverse_temperature);
        const int64_t column = args.targets[row] - args.shard.start;
        const bool is_here = column >= 0 && column < args.shard.width;
        args.sums[row] = sums.exp;
        args.sums[rows + row] = sums.x_exp;
        args.sums[2 * rows + row] =
            is_here ? (args.local.target[row] - without_infinity(max)) * inverse_temperature : 0.0;
    }
}

}  // namespace

void merge_stats(const MergeStats& args, void* stream) {
    launch<merge_stats_kernel>("merge_stats", divide_up(args.num_rows, kThreads), stream, args);
}

}  // namespace gspo::cuda
