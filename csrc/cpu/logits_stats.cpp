// Statistics of each row of the logits, each row read from memory once.
#include <cmath>

#include "cpu/vector.h"

namespace gspo::cpu::GSPO_ISA {

namespace {

constexpr int64_t kBlock = 1024;  // columns whose maximum is taken before their sums: they stay in the first cache

// Sums over the columns seen so far, relative to their maximum.
struct RowStatistics {
    double max = -kInfinity;
    double ones = 0;  // columns equal to the maximum: each adds 1 to the sum of e^x
    double rest = 0;  // what the other columns add to it
    double sum_x_exp = 0;

    double sum_exp() const { return ones + rest; }

    void raise_max(double to, double inverse_temperature) {
        if (max > -kInfinity) {
            const double delta = (max - to) * inverse_temperature, scale = std::exp(delta);
            sum_x_exp = scale > 0 ? scale * (sum_x_exp + delta * sum_exp()) : 0;
            rest = scale * sum_exp();
            ones = 0;
        }
        max = to;
    }

    void add(const RowStatistics& other, double inverse_temperature) {
        RowStatistics theirs = other;
        if (other.max > max) raise_max(other.max, inverse_temperature);
        if (theirs.max < max) theirs.raise_max(max, inverse_temperature);
        ones += theirs.ones;
        rest += theirs.rest;
        sum_x_exp += theirs.sum_x_exp;
    }
};

template <typename Storage>
struct BlockReader {  // the vectors of a block; the last one may be part of a vector, padded with -inf
    static constexpr int64_t lanes = kLanes<RealOf<Storage>>;
    const Storage* data;
    int64_t count;

    template <typename F>
    inline void each(F f) const {
        int64_t i = 0;
        for (; i + lanes <= count; i += lanes) f(Element<Storage>::load(data + i));
        if (i < count) f(load_part(data + i, count - i, Element<Storage>::minus_infinity()));
    }
};

template <bool holds_max, typename Storage>
void add_block(const BlockReader<Storage>& block, RowStatistics& row, RealOf<Storage> inverse_temperature) {
    using Real = RealOf<Storage>;
    using V = Vector<Real>;
    const Real max = static_cast<Real>(row.max);
    const V lowest = fill(Exponential<Real>::lowest);
    V sum{}, sum_x{};
    Integers<Real> ones{};
    block.each([&](V logits) {
        const V x = at_least((logits - max) * inverse_temperature, lowest);
        V weight = exp_above_lowest<Real>(x);
        if (holds_max) {
            const Integers<Real> is_max = x >= V{};
            ones -= is_max;
            weight = is_max ? V{} : weight;
        }
        sum += weight;
        sum_x += weight * x;
    });
    const double of_x = sum_of_lanes<Real>(sum_x);
    row.rest += of_x == of_x ? sum_of_lanes<Real>(sum) : kNaN;  // the exponential may hide a NaN, its product with x not
    row.sum_x_exp += of_x;
    for (int64_t i = 0; holds_max && i < kLanes<Real>; ++i) row.ones += static_cast<double>(ones[i]);
}

template <typename Storage>
RowStatistics statistics_of(const Storage* logits, int64_t width, double inverse_temperature) {
    using Real = RealOf<Storage>;
    RowStatistics row;
    for (int64_t start = 0; start < width; start += kBlock) {
        const BlockReader<Storage> block{logits + start, width - start < kBlock ? width - start : kBlock};
        Vector<Real> maxima = fill(static_cast<Real>(-kInfinity));
        block.each([&](Vector<Real> values) { maxima = values > maxima ? values : maxima; });
        const double max = largest_lane<Real>(maxima);
        if (max > row.max) row.raise_max(max, inverse_temperature);
        if (row.max == -kInfinity) continue;  // -inf columns alone
        if (max == row.max) {
            add_block<true>(block, row, static_cast<Real>(inverse_temperature));
        } else {
            add_block<false>(block, row, static_cast<Real>(inverse_temperature));
        }
    }
    if (row.max == -kInfinity) {  // nothing was added, and a NaN hides behind the maximum
        for (int64_t i = 0; i < width; ++i) row.rest += load_one(logits + i) == -kInfinity ? 0 : kNaN;
    }
    return row;
}

}  // namespace

void logits_stats(const LogitsStats& args, int num_threads) {
    with_storage(args.logits.dtype, [&](auto tag) {
        using Storage = decltype(tag);
        const Shard& shard = args.shard;
        parallel_for(args.logits.rows, num_threads, [&](int64_t t) {
            const Storage* logits = static_cast<const Storage*>(args.logits.data) + t * args.logits.stride;
            RowStatistics row = statistics_of(logits, shard.width, shard.inverse_temperature);
            const int64_t column = args.targets[t] - shard.start;
            const bool is_here = column >= 0 && column < shard.width;
            double target = is_here ? static_cast<double>(load_one(logits + column)) : 0.0;
            if (args.accumulate) {
                const double sum_exp = args.out.sum_exp[t];
                row.add({args.out.max[t], 0.0, sum_exp, args.out.sum_x_exp[t]}, shard.inverse_temperature);
                target += args.out.target[t];
            }
            args.out.max[t] = row.max;
            args.out.sum_exp[t] = row.sum_exp();
            args.out.sum_x_exp[t] = row.sum_x_exp;
            args.out.target[t] = target;
        });
    });
}

}  // namespace gspo::cpu::GSPO_ISA
