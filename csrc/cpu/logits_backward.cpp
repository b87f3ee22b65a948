// The gradient of log-probabilities and entropies by the logits, each row read and written once, also in place.
#include <cmath>

#include "cpu/vector.h"

namespace gspo::cpu::GSPO_ISA {

namespace {

struct RowGradient {
    double shift, log_sum, mean;
    double logprob, entropy;  // incoming
    double inverse_temperature;

    // 1 - p of an almost certain token would have no digits left in the logits' own precision.
    double at_target(double logit) const {
        const double x = (logit - shift) * inverse_temperature, log_p = x - log_sum, p = std::exp(log_p);
        const double of_entropy = p > 0 ? entropy * p * (x - mean) : 0.0;
        return inverse_temperature * (logprob * -std::expm1(log_p) - of_entropy);
    }
};

template <bool with_entropy, typename In, typename Out>
void write_row(const In* logits, Out* out, int64_t width, const RowGradient& row) {
    using Real = RealOf<In>;
    using V = Vector<Real>;
    constexpr int64_t lanes = kLanes<Real>;
    const double scale = row.inverse_temperature * std::exp(-row.log_sum);
    const Real shift = static_cast<Real>(row.shift), mean = static_cast<Real>(row.mean);
    const Real inverse_temperature = static_cast<Real>(row.inverse_temperature);
    const V of_logprob = fill(static_cast<Real>(-scale * row.logprob));
    const Real of_entropy = static_cast<Real>(-scale * row.entropy);
    const auto gradient = [&](V values) {
        const V x = (values - shift) * inverse_temperature;
        const V weight = exp_to_zero<Real>(x);
        if (!with_entropy) return weight * of_logprob;
        const V lowest = fill(Exponential<Real>::lowest);
        return weight * (of_logprob + of_entropy * (at_least(x, lowest) - mean));  // 0 · -inf would be NaN
    };
    int64_t i = 0;
    for (; i + lanes <= width; i += lanes) Element<Out>::store(out + i, gradient(Element<In>::load(logits + i)));
    if (i < width) {
        store_part(out + i, width - i, gradient(load_part(logits + i, width - i, Element<In>::minus_infinity())));
    }
}

template <typename In, typename Out>
void write_rows(const LogitsBackward& args, int num_threads) {
    using Real = RealOf<In>;
    const auto incoming = [](const void* values, int64_t t) -> double {
        return values == nullptr ? 0.0 : static_cast<const Real*>(values)[t];
    };
    parallel_for(args.logits.rows, num_threads, [&](int64_t t) {
        const In* logits = static_cast<const In*>(args.logits.data) + t * args.logits.stride;
        Out* out = static_cast<Out*>(args.out.data) + t * args.out.stride;
        const RowGradient row{args.rows.shift[t],
                              args.rows.log_sum[t],
                              args.rows.mean[t],
                              incoming(args.grad_logprobs, t),
                              incoming(args.grad_entropy, t),
                              args.shard.inverse_temperature};
        if (row.logprob == 0 && row.entropy == 0) {
            memset(out, 0, sizeof(Out) * args.out.columns);
            return;
        }
        const int64_t width = args.shard.width, column = args.targets[t] - args.shard.start;
        const bool is_here = column >= 0 && column < width;
        const double target = is_here ? row.at_target(load_one(logits + column)) : 0.0;  // before it is overwritten
        if (row.entropy == 0) {
            write_row<false>(logits, out, width, row);
        } else {
            write_row<true>(logits, out, width, row);
        }
        if (is_here) store_part(out + column, 1, fill(static_cast<Real>(target)));
        memset(out + width, 0, sizeof(Out) * (args.out.columns - width));
    });
}

}  // namespace

void logits_backward(const LogitsBackward& args, int num_threads) {
    with_storage(args.logits.dtype, [&](auto in) {
        using In = decltype(in);
        if (args.out.dtype == args.logits.dtype) {
            write_rows<In, In>(args, num_threads);
            return;
        }
        with_storage(args.out.dtype, [&](auto out) {
            using Out = decltype(out);
            if constexpr (sizeof(RealOf<In>) == sizeof(RealOf<Out>)) write_rows<In, Out>(args, num_threads);
        });
    });
}

}  // namespace gspo::cpu::GSPO_ISA
