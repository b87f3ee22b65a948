// From the statistics of each rank's columns to log-probabilities, in two halves around a sum over the ranks.
#include <cmath>

#include "cpu/vector.h"

namespace gspo::cpu::GSPO_ISA {

static inline double finite_shift(double max) { return max == -kInfinity ? 0.0 : max; }

void merge_stats(const MergeStats& args, int) {
    const int64_t rows = args.num_rows;
    double *sum_exp = args.sums, *sum_x_exp = args.sums + rows, *target = args.sums + 2 * rows;
    const double inverse_temperature = args.shard.inverse_temperature;
    for (int64_t t = 0; t < rows; ++t) {
        const double shift = finite_shift(args.max[t]);
        const double delta = (args.local.max[t] - shift) * inverse_temperature, scale = std::exp(delta);
        sum_exp[t] = scale * args.local.sum_exp[t];
        // A rank of -inf columns alone has scale 0 and delta -inf.
        sum_x_exp[t] = scale * args.local.sum_x_exp[t] + (scale > 0 ? delta * sum_exp[t] : 0.0);
        const int64_t column = args.targets[t] - args.shard.start;
        const bool is_here = column >= 0 && column < args.shard.width;
        target[t] = is_here ? (args.local.target[t] - shift) * inverse_temperature : 0.0;
    }
}

template <typename Real>
static void finish(const FinishStats& args) {
    const int64_t rows = args.num_rows;
    const double *sum_exp = args.sums, *sum_x_exp = args.sums + rows, *target = args.sums + 2 * rows;
    for (int64_t t = 0; t < rows; ++t) {
        const bool is_possible = sum_exp[t] != 0.0;
        const double log_sum = is_possible ? std::log(sum_exp[t]) : 0.0;
        const double mean = is_possible ? sum_x_exp[t] / sum_exp[t] : 0.0;
        const bool is_foreign = args.targets[t] < args.first_target || args.targets[t] >= args.end_target;
        static_cast<Real*>(args.logprobs)[t] = static_cast<Real>(is_foreign ? kNaN : target[t] - log_sum);
        static_cast<Real*>(args.entropy)[t] = static_cast<Real>(log_sum - mean);
        args.rows.shift[t] = finite_shift(args.max[t]);
        args.rows.log_sum[t] = log_sum;
        args.rows.mean[t] = mean;
    }
}

void finish_stats(const FinishStats& args, int) {
    with_real(args.dtype, [&](auto tag) { finish<decltype(tag)>(args); });
}

}  // namespace gspo::cpu::GSPO_ISA
