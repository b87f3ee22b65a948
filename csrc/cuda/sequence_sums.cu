// Sums over the response tokens of each sequence: a block a sequence.
#include "common.cuh"

namespace gspo::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads) sequence_sums_kernel(const SequenceSums args) {
    const T *values = static_cast<const T*>(args.values), *subtrahend = static_cast<const T*>(args.subtrahend);
    for (int64_t sequence = blockIdx.x; sequence < args.pack.num_sequences; sequence += gridDim.x) {
        const ResponseSums sums = response_sums(args.pack, span_of(args.pack, sequence), values, subtrahend);
        if (threadIdx.x == 0) {
            args.sums[sequence] = sums.sum;
            args.num_tokens[sequence] = sums.num_tokens;
        }
    }
}

}  // namespace

void sequence_sums(const SequenceSums& args, void* stream) {
    with_real("sequence_sums", args.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        launch<sequence_sums_kernel<T>>("sequence_sums", args.pack.num_sequences, stream, args);
    });
}

}  // namespace gspo::cuda
