// The clipped policy loss of packed sequences with its gradient: one pass over each sequence's tokens for the sums,
// one for the results while they are in the cache.
#include <cmath>

#include "cpu/sequences.h"

namespace gspo::cpu::GSPO_ISA {

namespace {

// A clip of 3e-4 is decided on the log of the ratio, which keeps the digits that the ratio has spent on its 1.
struct Clip {
    double low, high, dual;
    double log_low, log_high, log_dual;

    explicit Clip(const PolicyLoss& args)
        : low(1.0 - args.clip_low),
          high(1.0 + args.clip_high),
          dual(args.dual_clip),
          log_low(std::log1p(-args.clip_low)),
          log_high(std::log1p(args.clip_high)),
          log_dual(std::log(args.dual_clip)) {}

    bool stops(double log_ratio, double advantage) const {
        return (advantage > 0 && log_ratio > log_high) ||
               (advantage < 0 && (log_ratio < log_low || log_ratio > log_dual));
    }

    double bound(double ratio, double advantage) const {
        if (advantage > 0) return ratio > high ? high : ratio;
        const double above = ratio < low ? low : ratio;
        return above > dual ? dual : above;
    }
};

template <typename Real>
struct Tensors {
    const Real *logprobs, *old_logprobs, *advantages, *weights;
    Real *gradient, *log_ratio;

    explicit Tensors(const PolicyLoss& args)
        : logprobs(static_cast<const Real*>(args.logprobs)),
          old_logprobs(static_cast<const Real*>(args.old_logprobs)),
          advantages(static_cast<const Real*>(args.advantages)),
          weights(static_cast<const Real*>(args.weights)),
          gradient(static_cast<Real*>(args.gradient)),
          log_ratio(static_cast<Real*>(args.log_ratio)) {}
};

// One ratio and one advantage for all tokens: GSPO.
template <typename Real>
double whole_sequence(const PolicyLoss& args, const Clip& clip, int64_t s, double log_ratio, double divisor) {
    const Tensors<Real> x(args);
    const Range range = range_of(args.pack, s);
    const double advantage = x.advantages[s], ratio = std::exp(log_ratio);
    const bool is_clipped = clip.stops(log_ratio, advantage);
    const bool is_idle = advantage == 0;  // 0 · inf is NaN: without an advantage no ratio counts, however large
    const int64_t num_tokens = count_of(args.pack, range);
    fill_response(args.pack, range, static_cast<Real>(is_idle || is_clipped ? 0.0 : -ratio * advantage / divisor),
                  x.gradient);
    fill_response(args.pack, range, is_clipped, args.clipped_tokens);
    args.num_clipped[s] = is_clipped ? num_tokens : 0;
    return is_idle || num_tokens == 0 ? 0.0 : -clip.bound(ratio, advantage) * advantage * num_tokens / divisor;
}

// A ratio, an advantage or a weight of its own for each token: GRPO, GSPO-token, and any of them weighted.
template <typename Real>
double each_token(const PolicyLoss& args, const Clip& clip, int64_t s, double sequence_log_ratio, double divisor) {
    constexpr int64_t chunk = 64;
    const Tensors<Real> x(args);
    const uint8_t* mask = bytes_of(args.pack.response_mask);
    const Range range = range_of(args.pack, s);
    double loss = 0, log_ratios[chunk] = {}, ratios[chunk];
    int64_t num_clipped = 0;
    for (int64_t start = range.begin; start < range.end; start += chunk) {
        const int64_t count = range.end - start < chunk ? range.end - start : chunk;
        for (int64_t i = 0; i < count; ++i) {
            const double own = static_cast<double>(x.logprobs[start + i]) - x.old_logprobs[start + i];
            log_ratios[i] = args.token_level ? own : sequence_log_ratio;
        }
        for (int64_t i = 0; i < count; i += kLanes<double>) {
            Element<double>::store(ratios + i, exp_of_any(Element<double>::load(log_ratios + i)));
        }
        for (int64_t i = 0; i < count; ++i) {
            const int64_t t = start + i;
            const double advantage = mask[t] ? x.advantages[args.advantage_per_token ? t : s] : Real(0);
            const double scale = x.weights == nullptr || !mask[t] ? advantage : advantage * x.weights[t];
            const bool is_clipped = clip.stops(log_ratios[i], advantage), is_idle = scale == 0;
            const double slope = is_idle || is_clipped ? 0.0 : -ratios[i] * scale / divisor;
            loss -= is_idle ? 0.0 : clip.bound(ratios[i], advantage) * scale / divisor;
            x.gradient[t] = static_cast<Real>(slope);
            args.clipped_tokens[t] = is_clipped;
            num_clipped += is_clipped;
        }
    }
    args.num_clipped[s] = num_clipped;
    return loss;
}

template <typename Real>
double one_sequence(const PolicyLoss& args, const Clip& clip, int64_t s) {
    const Tensors<Real> x(args);
    double *sum = args.sums + s, *num_tokens = args.sums + args.pack.num_sequences + s;
    if (!args.sums_are_given) {
        const Range range = range_of(args.pack, s);
        *sum = sum_of_response(args.pack, range, x.logprobs, x.old_logprobs);
        *num_tokens = static_cast<double>(count_of(args.pack, range));
    }
    const double length = *num_tokens < 1 ? 1.0 : *num_tokens;
    const double log_ratio = *sum / length, divisor = length * args.num_global;
    x.log_ratio[s] = static_cast<Real>(log_ratio);
    args.num_response_tokens[s] = static_cast<int64_t>(*num_tokens);
    const bool as_a_whole = !args.token_level && !args.advantage_per_token && args.weights == nullptr;
    return as_a_whole ? whole_sequence<Real>(args, clip, s, log_ratio, divisor)
                      : each_token<Real>(args, clip, s, log_ratio, divisor);
}

// The sum of the terms as integers of a common scale, which no order of the sequences changes.
double sum_in_any_order(const double* terms, int64_t count) {
    double largest = 0, plain = 0;
    for (int64_t i = 0; i < count; ++i) {
        const double size = std::fabs(terms[i]);
        largest = size > largest ? size : largest;
        plain += terms[i];
    }
    const bool is_finite = plain - plain == 0;
    if (!is_finite || largest == 0) return plain;
    int exponent = 0, bits = 0;
    std::frexp(largest, &exponent);
    while ((int64_t(1) << bits) < count) ++bits;
    const int scale = 62 - bits - exponent;
    int64_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += std::llrint(std::ldexp(terms[i], scale));
    return std::ldexp(static_cast<double>(sum), -scale);
}

}  // namespace

void policy_loss(const PolicyLoss& args, int num_threads) {
    const Clip clip(args);
    with_real(args.dtype, [&](auto tag) {
        using Real = decltype(tag);
        zero_outside(args.pack, static_cast<Real*>(args.gradient));
        zero_outside(args.pack, args.clipped_tokens);
        parallel_for(args.pack.num_sequences, num_threads,
                     [&](int64_t s) { args.terms[s] = one_sequence<Real>(args, clip, s); });
    });
    *args.loss = sum_in_any_order(args.terms, args.pack.num_sequences);
}

}  // namespace gspo::cpu::GSPO_ISA
