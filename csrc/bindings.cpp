// The Python module gspo_megatron._C: addresses, sizes and numbers in, nothing out. It knows nothing of torch.
//
// Tensors arrive as the integers of their data pointers (0 for none), streams as the integer of their handle; the
// caller has checked shapes, dtypes and devices. The GIL is released while an operation runs.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <type_traits>

#include "launchers.h"

namespace py = pybind11;
using namespace py::literals;

namespace gspo {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Where an operation runs: on the CPU with a number of threads, or on a CUDA stream.
struct Place {
    bool is_cuda;
    int num_threads;
    uintptr_t stream;
};

template <typename Arguments>
using OnCpu = void (*)(const Arguments&, int num_threads);
template <typename Arguments>
using OnCuda = void (*)(const Arguments&, void* stream);

template <typename Arguments>
void launch(const Place& place, const Arguments& args, std::common_type_t<OnCpu<Arguments>> on_cpu,
            std::common_type_t<OnCuda<Arguments>> on_cuda) {
    py::gil_scoped_release unlocked;
    if (!place.is_cuda) {
        on_cpu(args, place.num_threads);
    } else if (on_cuda != nullptr) {
        on_cuda(args, pointer<void>(place.stream));
    } else {
        throw std::runtime_error("built without CUDA kernels");
    }
}

#ifdef GSPO_WITH_CUDA
constexpr bool kWithCuda = true;
#define GSPO_BOTH(name) cpu::name, cuda::name
#else
constexpr bool kWithCuda = false;
#define GSPO_BOTH(name) cpu::name, nullptr
#endif

Matrix matrix(uintptr_t data, int dtype, int64_t rows, int64_t columns, int64_t stride) {
    return {pointer<void>(data), static_cast<Dtype>(dtype), rows, columns, stride};
}

Shard shard(int64_t start, int64_t width, double inverse_temperature) { return {start, width, inverse_temperature}; }

// [4, T]
Statistics statistics(uintptr_t data, int64_t rows) {
    double* first = pointer<double>(data);
    return {first, first + rows, first + 2 * rows, first + 3 * rows};
}

// [3, T]
Rows row_values(uintptr_t data, int64_t rows) {
    double* first = pointer<double>(data);
    return {first, first + rows, first + 2 * rows};
}

Pack pack(int64_t num_tokens, int64_t num_sequences, uintptr_t response_mask, uintptr_t cu_seqlens) {
    return {num_tokens, num_sequences, pointer<const bool>(response_mask), pointer<const int64_t>(cu_seqlens)};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native operations of gspo_megatron.ops; csrc/launchers.h says what each computes.";
    m.attr("with_cuda") = kWithCuda;
    m.def("instruction_set", &cpu::instruction_set);

    py::class_<Place>(m, "Place").def(py::init<bool, int, uintptr_t>());
    py::class_<Matrix>(m, "Matrix").def(py::init(&matrix));
    py::class_<Shard>(m, "Shard").def(py::init(&shard));
    py::class_<Pack>(m, "Pack").def(py::init(&pack));

    m.def("logits_stats", [](const Place& place, const Matrix& logits, uintptr_t targets, const Shard& shard,
                             bool accumulate, uintptr_t out) {
        const LogitsStats args{logits, pointer<const int64_t>(targets), shard, accumulate,
                               statistics(out, logits.rows)};
        launch(place, args, GSPO_BOTH(logits_stats));
    });
    m.def("merge_stats", [](const Place& place, int64_t rows, uintptr_t targets, const Shard& shard, uintptr_t local,
                            uintptr_t max, uintptr_t sums) {
        const MergeStats args{rows,  pointer<const int64_t>(targets), shard,
                              statistics(local, rows), pointer<const double>(max), pointer<double>(sums)};
        launch(place, args, GSPO_BOTH(merge_stats));
    });
    m.def("finish_stats", [](const Place& place, int64_t rows, uintptr_t targets, int64_t first_target,
                             int64_t end_target, uintptr_t max, uintptr_t sums, int dtype, uintptr_t logprobs,
                             uintptr_t entropy, uintptr_t row_data) {
        const FinishStats args{rows, pointer<const int64_t>(targets), first_target, end_target,
                               pointer<const double>(max), pointer<const double>(sums), static_cast<Dtype>(dtype),
                               pointer<void>(logprobs), pointer<void>(entropy), row_values(row_data, rows)};
        launch(place, args, GSPO_BOTH(finish_stats));
    });
    m.def("logits_backward", [](const Place& place, const Matrix& logits, const Matrix& out, uintptr_t targets,
                                const Shard& shard, uintptr_t row_data, int grad_dtype, uintptr_t grad_logprobs,
                                uintptr_t grad_entropy) {
        const LogitsBackward args{logits, out, pointer<const int64_t>(targets), shard,
                                  row_values(row_data, logits.rows), static_cast<Dtype>(grad_dtype),
                                  pointer<const void>(grad_logprobs), pointer<const void>(grad_entropy)};
        launch(place, args, GSPO_BOTH(logits_backward));
    });
    m.def("sequence_sums", [](const Place& place, const Pack& pack, int dtype, uintptr_t values, uintptr_t subtrahend,
                              uintptr_t sums) {
        double* first = pointer<double>(sums);
        const SequenceSums args{pack, static_cast<Dtype>(dtype), pointer<const void>(values),
                                pointer<const void>(subtrahend), first, first + pack.num_sequences};
        launch(place, args, GSPO_BOTH(sequence_sums));
    });
    m.def("sequence_fill", [](const Place& place, const Pack& pack, uintptr_t scale, int dtype, uintptr_t out) {
        const SequenceFill args{pack, pointer<const double>(scale), static_cast<Dtype>(dtype), pointer<void>(out)};
        launch(place, args, GSPO_BOTH(sequence_fill));
    });
    m.def(
        "policy_loss",
        [](const Place& place, const Pack& pack, int dtype, uintptr_t logprobs, uintptr_t old_logprobs,
           uintptr_t advantages, bool advantage_per_token, uintptr_t weights, bool token_level, double clip_low,
           double clip_high, double dual_clip, double num_global, uintptr_t sums, bool sums_are_given,
           uintptr_t gradient, uintptr_t terms, uintptr_t loss, uintptr_t log_ratio, uintptr_t clipped_tokens,
           uintptr_t num_clipped, uintptr_t num_response_tokens) {
            PolicyLoss args{};
            args.pack = pack;
            args.dtype = static_cast<Dtype>(dtype);
            args.logprobs = pointer<const void>(logprobs);
            args.old_logprobs = pointer<const void>(old_logprobs);
            args.advantages = pointer<const void>(advantages);
            args.advantage_per_token = advantage_per_token;
            args.weights = pointer<const void>(weights);
            args.token_level = token_level;
            args.clip_low = clip_low;
            args.clip_high = clip_high;
            args.dual_clip = dual_clip;
            args.num_global = num_global;
            args.sums = pointer<double>(sums);
            args.sums_are_given = sums_are_given;
            args.gradient = pointer<void>(gradient);
            args.terms = pointer<double>(terms);
            args.loss = pointer<double>(loss);
            args.log_ratio = pointer<void>(log_ratio);
            args.clipped_tokens = pointer<bool>(clipped_tokens);
            args.num_clipped = pointer<int64_t>(num_clipped);
            args.num_response_tokens = pointer<int64_t>(num_response_tokens);
            launch(place, args, GSPO_BOTH(policy_loss));
        },
        py::kw_only{}, "place"_a, "pack"_a, "dtype"_a, "logprobs"_a, "old_logprobs"_a, "advantages"_a,
        "advantage_per_token"_a, "weights"_a, "token_level"_a, "clip_low"_a, "clip_high"_a, "dual_clip"_a,
        "num_global"_a, "sums"_a, "sums_are_given"_a, "gradient"_a, "terms"_a, "loss"_a, "log_ratio"_a,
        "clipped_tokens"_a, "num_clipped"_a, "num_response_tokens"_a);
}

}  // namespace gspo
