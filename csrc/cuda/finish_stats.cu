// From the sums over all ranks to log-probability, entropy and what backward needs: a thread a row.
#include "common.cuh"

namespace gspo::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads) finish_stats_kernel(const FinishStats args) {
    const int64_t rows = args.num_rows, step = int64_t(gridDim.x) * kThreads;
    T *logprobs = static_cast<T*>(args.logprobs), *entropy = static_cast<T*>(args.entropy);
    for (int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x; row < rows; row += step) {
        const double sum_exp = args.sums[row], sum_x_exp = args.sums[rows + row], x = args.sums[2 * rows + row];
        const bool is_possible = sum_exp != 0.0;  // 0 is a row of -inf; NaN is possible, so that it shows
        const double log_sum = is_possible ? log(sum_exp) : 0.0, mean = is_possible ? sum_x_exp / sum_exp : 0.0;
        const int64_t target = args.targets[row];
        const bool is_foreign = target < args.first_target || target >= args.end_target;
        logprobs[row] = static_cast<T>(is_foreign ? kNaN : x - log_sum);
        entropy[row] = static_cast<T>(log_sum - mean);
        args.rows.shift[row] = without_infinity(args.max[row]);
        args.rows.log_sum[row] = log_sum;
        args.rows.mean[row] = mean;
    }
}

}  // namespace

void finish_stats(const FinishStats& args, void* stream) {
    with_real("finish_stats", args.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        launch<finish_stats_kernel<T>>("finish_stats", divide_up(args.num_rows, kThreads), stream, args);
    });
}

}  // namespace gspo::cuda
