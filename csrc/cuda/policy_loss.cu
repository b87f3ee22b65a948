// The clipped policy loss of packed sequences and its gradient: a block a sequence, then one block for their sum.
#include "common.cuh"

namespace gspo::cuda {
namespace {

// A clip of 3e-4 is decided on the log of the ratio, which keeps the digits that the ratio has spent on its 1.
struct Clip {
    double low, high, dual;              // bounds of the ratio; dual is infinity where there is none
    double log_low, log_high, log_dual;  // of its log

    __device__ bool stops(double log_ratio, double advantage) const {
        return advantage > 0 ? log_ratio > log_high
                             : advantage < 0 && (log_ratio < log_low || log_ratio > log_dual);
    }

    __device__ double bound(double ratio, double advantage) const {  // NaN stays NaN
        if (advantage > 0) return ratio > high ? high : ratio;
        return ratio < low ? low : ratio > dual ? dual : ratio;
    }
};

struct PolicyLossKernel {
    PolicyLoss args;
    Clip clip;
};

template <typename T>
__device__ void one_sequence(const PolicyLoss& args, const Clip& clip, int64_t sequence) {
    const T *logprobs = static_cast<const T*>(args.logprobs), *old_logprobs = static_cast<const T*>(args.old_logprobs);
    const T *advantages = static_cast<const T*>(args.advantages), *weights = static_cast<const T*>(args.weights);
    const int64_t num_sequences = args.pack.num_sequences;
    const Span span = span_of(args.pack, sequence);
    const ResponseSums sums = args.sums_are_given
                                  ? ResponseSums{args.sums[sequence], args.sums[num_sequences + sequence]}
                                  : response_sums(args.pack, span, logprobs, old_logprobs);
    const double length = sums.num_tokens < 1.0 ? 1.0 : sums.num_tokens, divisor = length * args.num_global;
    const double log_ratio = sums.sum / length, ratio = exp(log_ratio);

    double term = 0.0;
    int64_t num_clipped = 0;
    for (int64_t t = span.begin + threadIdx.x; t < span.end; t += kThreads) {
        double gradient = 0.0;
        bool is_clipped = false;
        if (args.pack.response_mask[t]) {  // nothing of a masked token is read: 0 · NaN is NaN
            const double advantage = advantages[args.advantage_per_token ? t : sequence];
            const double scale = weights == nullptr ? advantage : advantage * static_cast<double>(weights[t]);
            double token_log_ratio = log_ratio, token_ratio = ratio;
            if (args.token_level) {
                token_log_ratio = static_cast<double>(logprobs[t]) - static_cast<double>(old_logprobs[t]);
                token_ratio = exp(token_log_ratio);
            }
            is_clipped = clip.stops(token_log_ratio, advantage);
            if (scale != 0.0) {  // 0 · inf is NaN: without an advantage no ratio counts, however large
                term -= clip.bound(token_ratio, advantage) * scale / divisor;
                if (!is_clipped) gradient = -token_ratio * scale / divisor;
            }
        }
        static_cast<T*>(args.gradient)[t] = static_cast<T>(gradient);
        args.clipped_tokens[t] = is_clipped;
        num_clipped += is_clipped;
    }
    term = block_sum(term);
    num_clipped = block_sum(num_clipped);
    if (threadIdx.x == 0) {
        if (!args.sums_are_given) {
            args.sums[sequence] = sums.sum;
            args.sums[num_sequences + sequence] = sums.num_tokens;
        }
        args.terms[sequence] = term;
        args.num_clipped[sequence] = num_clipped;
        args.num_response_tokens[sequence] = static_cast<int64_t>(sums.num_tokens);
        static_cast<T*>(args.log_ratio)[sequence] = static_cast<T>(log_ratio);
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) policy_loss_kernel(const PolicyLossKernel kernel) {
    const PolicyLoss& args = kernel.args;
    for (int64_t sequence = blockIdx.x; sequence < args.pack.num_sequences; sequence += gridDim.x) {
        one_sequence<T>(args, kernel.clip, sequence);
    }
    each_token_outside(args.pack, [&](int64_t t) {
        static_cast<T*>(args.gradient)[t] = T(0);
        args.clipped_tokens[t] = false;
    });
}

// The sum of the terms as integers of a common scale, so that no order of the sequences changes a bit of it.
__global__ void __launch_bounds__(kThreads) sum_terms_kernel(const PolicyLoss args) {
    const int64_t count = args.pack.num_sequences;
    double largest = 0.0, plain = 0.0;
    for (int64_t i = threadIdx.x; i < count; i += kThreads) {
        largest = larger(largest, fabs(args.terms[i]));
        plain += args.terms[i];
    }
    largest = block_max(largest);
    plain = block_sum(plain);
    if (!isfinite(plain) || largest == 0.0) {  // the same in every thread
        if (threadIdx.x == 0) *args.loss = plain;
        return;
    }
    int exponent = 0, bits = 0;
    frexp(largest, &exponent);                    // largest < 2^exponent
    while ((int64_t(1) << bits) < count) ++bits;  // count <= 2^bits
    const int scale = 62 - bits - exponent;       // the sum stays within 2^62
    int64_t sum = 0;
    for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += llrint(ldexp(args.terms[i], scale));
    sum = block_sum(sum);
    if (threadIdx.x == 0) *args.loss = ldexp(static_cast<double>(sum), -scale);
}

}  // namespace

void policy_loss(const PolicyLoss& args, void* stream) {
    const Clip clip{1.0 - args.clip_low,         1.0 + args.clip_high,       args.dual_clip,
                    std::log1p(-args.clip_low), std::log1p(args.clip_high), std::log(args.dual_clip)};
    if (args.pack.num_tokens > 0 || args.pack.num_sequences > 0) {
        with_real("policy_loss", args.dtype, [&](auto type) {
            using T = typename decltype(type)::type;
            launch<policy_loss_kernel<T>>("policy_loss", std::max<int64_t>(args.pack.num_sequences, 1), stream,
                                          PolicyLossKernel{args, clip});
        });
    }
    launch<sum_terms_kernel>("policy_loss", 1, stream, args);
}

}  // namespace gspo::cuda
