// Gives every response token its sequence's number, and all other tokens 0: a block a sequence.
#include "common.cuh"

namespace gspo::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads) sequence_fill_kernel(const SequenceFill args) {
    const Pack& pack = args.pack;
    T* out = static_cast<T*>(args.out);
    for (int64_t sequence = blockIdx.x; sequence < pack.num_sequences; sequence += gridDim.x) {
        const Span span = span_of(pack, sequence);
        const T scale = static_cast<T>(args.scale[sequence]);
        for (int64_t t = span.begin + threadIdx.x; t < span.end; t += kThreads) {
            out[t] = pack.response_mask[t] ? scale : T(0);
        }
    }
    each_token_outside(pack, [=](int64_t t) { out[t] = T(0); });
}

}  // namespace

void sequence_fill(const SequenceFill& args, void* stream) {
    if (args.pack.num_tokens <= 0) return;
    with_real("sequence_fill", args.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        launch<sequence_fill_kernel<T>>("sequence_fill", std::max<int64_t>(args.pack.num_sequences, 1), stream, args);
    });
}

}  // namespace gspo::cuda
