// The gradient of log-probabilities and entropies by the logits, each row read and written once, also in place.
#include <type_traits>

#include "rows.cuh"

namespace gspo::cuda {
namespace {

struct RowGradient {
    double shift, log_sum, mean;
    double logprob, entropy;  // incoming
    double inverse_temperature;

    // 1 - p of an almost certain token would have no digits left in the logits' own precision.
    __device__ double at_target(double logit) const {
        const double x = (logit - shift) * inverse_temperature, log_p = x - log_sum, p = exp(log_p);
        const double of_entropy = p == 0.0 ? 0.0 : entropy * p * (x - mean);
        return inverse_temperature * (logprob * -expm1(log_p) - of_entropy);
    }
};

__device__ double incoming(const void* values, Dtype dtype, int64_t row) {
    if (values == nullptr) return 0.0;
    return dtype == Dtype::float64 ? static_cast<const double*>(values)[row] : static_cast<const float*>(values)[row];
}

// Of all columns but the target's: e^x (c0 + c1 (x - mean)), with x counted in powers of two.
template <typename R>
struct Others {
    R shift, scale, constant, slope;

    __device__ explicit Others(const RowGradient& row) {
        constexpr double log2_e = 1.4426950408889634, ln_2 = 0.6931471805599453;
        const double inverse_sum = row.inverse_temperature * exp(-row.log_sum), c1 = -row.entropy * inverse_sum;
        shift = static_cast<R>(row.shift);
        scale = static_cast<R>(row.inverse_temperature * log2_e);
        constant = static_cast<R>(-row.logprob * inverse_sum - c1 * row.mean);
        slope = static_cast<R>(c1 * ln_2);
    }

    __device__ R operator()(R logit) const {
        constexpr R lowest = -1e4;  // e^x is 0 there, and so is its product with x; with -inf it would be NaN
        const R x = (logit - shift) * scale;
        return exp2_of(x) * (constant + slope * larger(x, lowest));
    }
};

template <typename Shape, bool is_aligned, typename Out>
__device__ void write_zeros(Out* row, int64_t columns) {
    Vector<Out, Shape::elements> zeros;
    for (int i = 0; i < Shape::elements; ++i) assign(zeros.values[i], 0.0f);
    for (int64_t first = Shape::column_of(0); first < columns; first += Shape::column_of(1) - Shape::column_of(0)) {
        store_until<is_aligned>(row, first, columns, zeros);
    }
}

template <typename Shape, bool is_aligned, typename In, typename Out>
__device__ void write_row(const In* row, Out* out, int64_t width, const Others<Real<In>>& gradient) {
    Vector<In, Shape::elements> loaded[kLoads];
    const auto gradient_of = [&](const Vector<In, Shape::elements>& logits) {
        Vector<Out, Shape::elements> result;
#pragma unroll
        for (int i = 0; i < Shape::elements; ++i) assign(result.values[i], gradient(to_real(logits.values[i])));
        return result;
    };
    int64_t first = 0;
    for (; first + Shape::batch <= width; first += Shape::batch) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) load<is_aligned>(row + first + Shape::column_of(i), loaded[i]);
#pragma unroll
        for (int i = 0; i < kLoads; ++i) store<is_aligned>(out + first + Shape::column_of(i), gradient_of(loaded[i]));
    }
    for (int i = 0; i < kLoads; ++i) {
        const int64_t column = first + Shape::column_of(i);
        load_until<is_aligned>(row, column, width, loaded[0]);
        store_until<is_aligned>(out, column, width, gradient_of(loaded[0]));
    }
}

template <typename Shape, bool is_aligned, typename In, typename Out>
__global__ void __launch_bounds__(kThreads) logits_backward_kernel(const LogitsBackward args) {
    const int64_t width = args.shard.width, columns = args.out.columns;
    for (int64_t t = Shape::first_row(); t < args.logits.rows; t += Shape::row_step()) {
        const In* logits = static_cast<const In*>(args.logits.data) + t * args.logits.stride;
        Out* out = static_cast<Out*>(args.out.data) + t * args.out.stride;
        const RowGradient row{args.rows.shift[t],
                              args.rows.log_sum[t],
                              args.rows.mean[t],
                              incoming(args.grad_logprobs, args.grad_dtype, t),
                              incoming(args.grad_entropy, args.grad_dtype, t),
                              args.shard.inverse_temperature};
        if (row.logprob == 0.0 && row.entropy == 0.0) {
            write_zeros<Shape, is_aligned>(out, columns);
            continue;
        }
        // The thread that writes the target's column corrects it afterwards. In place its logit is gone by then.
        const int64_t column = args.targets[t] - args.shard.start;
        const bool is_mine = column >= 0 && column < width && Shape::takes(column);
        const double logit = is_mine ? static_cast<double>(to_real(logits[column])) : 0.0;
        write_row<Shape, is_aligned>(logits, out, width, Others<Real<In>>(row));
        if (is_mine) assign(out[column], row.at_target(logit));
        for (int64_t i = width + Shape::thread(); i < columns; i += Shape::threads_per_row) assign(out[i], 0.0f);
    }
}

template <typename In, typename Out>
void launch_backward(const LogitsBackward& args, void* stream) {
    with_shape<In>(args.shard.width, [&](auto shape) {
        using Shape = decltype(shape);
        const int64_t work = divide_up(args.logits.rows, Shape::rows_per_block);
        constexpr int64_t out_bytes = Shape::elements * sizeof(Out);
        if (is_aligned(args.logits, sizeof(In), 16) && is_aligned(args.out, sizeof(Out), out_bytes)) {
            launch<logits_backward_kernel<Shape, true, In, Out>>("logits_backward", work, stream, args);
        } else {
            launch<logits_backward_kernel<Shape, false, In, Out>>("logits_backward", work, stream, args);
        }
    });
}

}  // namespace

void logits_backward(const LogitsBackward& args, void* stream) {
    with_element("logits_backward", args.logits.dtype, [&](auto in) {
        using In = typename decltype(in)::type;
        with_element("logits_backward", args.out.dtype, [&](auto out) {
            using Out = typename decltype(out)::type;
            if constexpr (std::is_same_v<In, Out> || (std::is_same_v<In, float> && sizeof(Out) == 2)) {
                launch_backward<In, Out>(args, stream);
            } else {
                throw std::runtime_error(
                    "logits_backward: the gradient must have the logits' dtype, or for float32 logits half of it");
            }
        });
    });
}

}  // namespace gspo::cuda
