// Packed sequences: where each lies, and sums over its response tokens.
#pragma once

#include "cpu/vector.h"

namespace gspo::cpu::GSPO_ISA {

struct Range {
    int64_t begin, end;
};

static inline int64_t between(int64_t value, int64_t low, int64_t high) {
    return value < low ? low : (value > high ? high : value);
}

static inline Range range_of(const Pack& pack, int64_t s) {
    const int64_t begin = between(pack.cu_seqlens[s], 0, pack.num_tokens);
    return {begin, between(pack.cu_seqlens[s + 1], begin, pack.num_tokens)};
}

template <typename T>
static inline void zero_outside(const Pack& pack, T* values) {
    const int64_t begin = between(pack.cu_seqlens[0], 0, pack.num_tokens);
    const int64_t end = between(pack.cu_seqlens[pack.num_sequences], begin, pack.num_tokens);
    memset(values, 0, sizeof(T) * begin);
    memset(values + end, 0, sizeof(T) * (pack.num_tokens - end));
}

// Masks are read as bytes, of which any but 0 is true: the compiler makes no vector loop of bools.
static inline const uint8_t* bytes_of(const bool* mask) { return reinterpret_cast<const uint8_t*>(mask); }

static inline int64_t count_of(const Pack& pack, Range range) {
    const uint8_t* mask = bytes_of(pack.response_mask);
    int64_t count = 0;
    for (int64_t t = range.begin; t < range.end; ++t) count += mask[t] != 0;
    return count;
}

template <typename T>
static inline void fill_response(const Pack& pack, Range range, T value, T* __restrict out) {
    const uint8_t* __restrict mask = bytes_of(pack.response_mask);
    for (int64_t t = range.begin; t < range.end; ++t) out[t] = mask[t] ? value : T(0);
}

// The value, or 0 where the byte is 0. By its bits: 0 · NaN is NaN.
static inline double select(uint8_t byte, double value) {
    return bits_as<double>(bits_as<int64_t>(value) & -static_cast<int64_t>(byte != 0));
}

// The sum of f(t) over the response tokens of a range, in float64, in an order that depends on nothing but the
// distance from the range's start. f is called at the other tokens too, and what it gives there is dropped.
template <typename F>
static inline double masked_sum(const Pack& pack, Range range, F f) {
    constexpr int64_t ways = 32;
    const uint8_t* mask = bytes_of(pack.response_mask);
    double partial[ways] = {};
    int64_t t = range.begin;
    for (; t + ways <= range.end; t += ways) {
        for (int64_t i = 0; i < ways; ++i) partial[i] += select(mask[t + i], f(t + i));
    }
    for (int64_t i = 0; t < range.end; ++t, ++i) partial[i] += select(mask[t], f(t));
    double sum = 0;
    for (int64_t i = 0; i < ways; ++i) sum += partial[i];
    return sum;
}

// Subtracted token by token, then added: a difference of sums is 200 times worse.
template <typename Real>
static inline double sum_of_response(const Pack& pack, Range range, const Real* values, const Real* subtrahend) {
    if (subtrahend == nullptr) {
        return masked_sum(pack, range, [=](int64_t t) { return static_cast<double>(values[t]); });
    }
    return masked_sum(pack, range, [=](int64_t t) {
        return static_cast<double>(values[t]) - static_cast<double>(subtrahend[t]);
    });
}

}  // namespace gspo::cpu::GSPO_ISA
