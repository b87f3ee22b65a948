// Sums over the response tokens of each packed sequence, and their opposite: a number given to each of them.
#include "cpu/sequences.h"

namespace gspo::cpu::GSPO_ISA {

void sequence_sums(const SequenceSums& args, int num_threads) {
    with_real(args.dtype, [&](auto tag) {
        using Real = decltype(tag);
        const Real* values = static_cast<const Real*>(args.values);
        const Real* subtrahend = static_cast<const Real*>(args.subtrahend);
        parallel_for(args.pack.num_sequences, num_threads, [&](int64_t s) {
            const Range range = range_of(args.pack, s);
            args.sums[s] = sum_of_response(args.pack, range, values, subtrahend);
            args.num_tokens[s] = static_cast<double>(count_of(args.pack, range));
        });
    });
}

void sequence_fill(const SequenceFill& args, int num_threads) {
    with_real(args.dtype, [&](auto tag) {
        using Real = decltype(tag);
        Real* out = static_cast<Real*>(args.out);
        zero_outside(args.pack, out);
        parallel_for(args.pack.num_sequences, num_threads, [&](int64_t s) {
            fill_response(args.pack, range_of(args.pack, s), static_cast<Real>(args.scale[s]), out);
        });
    });
}

}  // namespace gspo::cpu::GSPO_ISA
