// Vectors of the instruction set this file is compiled for, through the compiler's vector extensions.
//
// Everything is in a namespace of that instruction set, and nothing here calls an inline function of the standard
// library: the linker keeps one copy of such a function, and it might be one that this processor cannot run.
#pragma once

#include <cstdint>
#include <cstring>

#include "launchers.h"

#if defined(__AVX512F__)
#define GSPO_VECTOR_BYTES 64
#elif defined(__AVX__)
#define GSPO_VECTOR_BYTES 32
#else
#define GSPO_VECTOR_BYTES 16
#endif

namespace gspo::cpu::GSPO_ISA {

constexpr double kInfinity = __builtin_inf();
constexpr double kNaN = __builtin_nan("");

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

template <typename Real>
struct LanesOf;

template <>
struct LanesOf<float> {
    static constexpr int64_t count = GSPO_VECTOR_BYTES / 4;
    typedef float Vector __attribute__((vector_size(GSPO_VECTOR_BYTES)));
    typedef int32_t Integers __attribute__((vector_size(GSPO_VECTOR_BYTES)));
};

template <>
struct LanesOf<double> {
    static constexpr int64_t count = GSPO_VECTOR_BYTES / 8;
    typedef double Vector __attribute__((vector_size(GSPO_VECTOR_BYTES)));
    typedef int64_t Integers __attribute__((vector_size(GSPO_VECTOR_BYTES)));
};

template <typename Real>
using Vector = typename LanesOf<Real>::Vector;
template <typename Real>
using Integers = typename LanesOf<Real>::Integers;
template <typename Real>
constexpr int64_t kLanes = LanesOf<Real>::count;

typedef uint16_t Halves __attribute__((vector_size(GSPO_VECTOR_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(GSPO_VECTOR_BYTES)));

template <typename To, typename From>
static inline To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    memcpy(&result, &value, sizeof(To));
    return result;
}

template <typename Real>
static inline Vector<Real> fill(Real value) {
    return value - Vector<Real>{};
}

// -- One element type of the logits: how it is read and written -------------------------------------------------

template <typename Storage>
struct Element;

template <typename Float>
struct PlainElement {
    using Real = Float;
    static inline Float minus_infinity() { return static_cast<Float>(-kInfinity); }
    static inline Vector<Real> load(const Float* from) {
        Vector<Real> result;
        memcpy(&result, from, sizeof(result));
        return result;
    }
    static inline void store(Float* to, Vector<Real> value) { memcpy(to, &value, sizeof(value)); }
};
template <>
struct Element<float> : PlainElement<float> {};
template <>
struct Element<double> : PlainElement<double> {};

template <typename Half>
static inline Words load_halves(const Half* from) {
    Halves halves;
    memcpy(&halves, from, sizeof(halves));
    return __builtin_convertvector(halves, Words);
}
template <typename Half>
static inline void store_halves(Half* to, Words words) {
    const Halves halves = __builtin_convertvector(words, Halves);
    memcpy(to, &halves, sizeof(halves));
}

template <>
struct Element<BFloat16> {
    using Real = float;
    static inline BFloat16 minus_infinity() { return {0xff80}; }
    static inline Vector<float> load(const BFloat16* from) { return bits_as<Vector<float>>(load_halves(from) << 16); }
    static inline void store(BFloat16* to, Vector<float> value) {
        const Words bits = bits_as<Words>(value);
        const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
        const Words quiet = (bits >> 16) | 0x40;
        store_halves(to, value == value ? rounded : quiet);
    }
};

template <>
struct Element<Float16> {
    using Real = float;
    static inline Float16 minus_infinity() { return {0xfc00}; }
    static inline Vector<float> load(const Float16* from) {
        const Words half = load_halves(from);
        const Words sign = (half & 0x8000) << 16, magnitude = (half & 0x7fff) << 13;
        // The product moves the exponent's bias, and is exact for subnormal numbers too.
        const Words finite = bits_as<Words>(bits_as<Vector<float>>(magnitude) * 0x1p112f);
        const Words infinite = magnitude | 0x7f800000;
        return bits_as<Vector<float>>((magnitude >= 0x0f800000 ? infinite : finite) | sign);
    }
    static inline void store(Float16* to, Vector<float> value) {
        const Words bits = bits_as<Words>(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
        const Words normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
        // Below 2^-14 adding 1/2 leaves the rounded subnormal number in the lowest bits.
        const Words subnormal = bits_as<Words>(bits_as<Vector<float>>(magnitude) + 0.5f) - 0x3f000000;
        Words half = magnitude < 0x38800000 ? subnormal : normal;
        half = magnitude >= 0x477ff000 ? Words{} + 0x7c00 : half;  // 65520 and more round to infinity
        half = magnitude > 0x7f800000 ? Words{} + 0x7e00 : half;
        store_halves(to, half | sign);
    }
};

template <typename Storage>
using RealOf = typename Element<Storage>::Real;

// The last vector of a row: what is missing reads as `padding`, and is not written.
template <typename Storage>
static inline Vector<RealOf<Storage>> load_part(const Storage* from, int64_t count, Storage padding) {
    Storage lanes[kLanes<RealOf<Storage>>];
    for (int64_t i = 0; i < kLanes<RealOf<Storage>>; ++i) lanes[i] = i < count ? from[i] : padding;
    return Element<Storage>::load(lanes);
}
template <typename Storage>
static inline void store_part(Storage* to, int64_t count, Vector<RealOf<Storage>> value) {
    Storage lanes[kLanes<RealOf<Storage>>];
    Element<Storage>::store(lanes, value);
    for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
}

template <typename Storage>
static inline RealOf<Storage> load_one(const Storage* from) {
    return load_part(from, 1, Element<Storage>::minus_infinity())[0];
}

// -- Arithmetic ---------------------------------------------------------------------------------------------------

template <typename V>
static inline V at_least(V x, V bound) {
    return x < bound ? bound : x;  // NaN stays NaN
}

template <typename Real>
struct Exponential;

template <>
struct Exponential<float> {
    static constexpr float lowest = -87.0f;  // below it e^x is not a normal number
    static constexpr float round = 0x1.8p23f;
    static constexpr int mantissa_bits = 23;
    // (e^r - 1 - r) / r^2 for |r| <= log(2)/2, least maximal relative error of e^r: 2e-9.
    static inline Vector<float> series(Vector<float> r) {
        return 0.49999992079816213f +
               r * (0.1666642016985033f +
                    r * (0.04166822556954786f + r * (0.00837481580423058f + r * 0.0013836845990916197f)));
    }
};

template <>
struct Exponential<double> {
    static constexpr double lowest = -708.0;
    static constexpr double round = 0x1.8p52;
    static constexpr int mantissa_bits = 52;
    static inline Vector<double> series(Vector<double> r) {  // Taylor's, whose next term is below 1e-17
        Vector<double> sum = fill<double>(1.0 / 87178291200.0);
        double factorial = 87178291200.0;
        for (int k = 13; k >= 2; --k) {
            factorial /= k + 1;
            sum = sum * r + 1.0 / factorial;
        }
        return sum;
    }
};

// e^x within 1.5 units in the last place, for x of at least `lowest`. Of a NaN it makes a NaN or any number.
template <typename Real>
static inline Vector<Real> exp_above_lowest(Vector<Real> x) {
    using E = Exponential<Real>;
    constexpr Real log2_e = 1.4426950408889634, log_2 = 0.6931471805599453;
    const Vector<Real> shifted = x * log2_e + E::round;  // its lowest bits hold the rounded power of two
    const Vector<Real> r = x - (shifted - E::round) * log_2;
    const Vector<Real> fraction = (E::series(r) * (r * r) + r) + Real(1);
    const Integers<Real> power = bits_as<Integers<Real>>(shifted) << E::mantissa_bits;
    return bits_as<Vector<Real>>(bits_as<Integers<Real>>(fraction) + power);
}

// The same, and exactly 0 below `lowest`.
template <typename Real>
static inline Vector<Real> exp_to_zero(Vector<Real> x) {
    const Vector<Real> lowest = fill(Exponential<Real>::lowest);
    const Vector<Real> value = exp_above_lowest<Real>(at_least(x, lowest));
    return x < lowest ? Vector<Real>{} : value;
}

static inline Vector<double> exp_of_any(Vector<double> x) {
    const Vector<double> highest = fill(709.0), bounded = x > highest ? highest : x;
    const Vector<double> value = exp_to_zero<double>(bounded);
    return x > highest ? fill(kInfinity) : value;
}

template <typename Real>
static inline Real largest_lane(Vector<Real> v) {
    Real result = v[0];
    for (int64_t i = 1; i < kLanes<Real>; ++i) result = v[i] > result ? v[i] : result;
    return result;
}

template <typename Real>
static inline double sum_of_lanes(Vector<Real> v) {
    double result = 0;
    for (int64_t i = 0; i < kLanes<Real>; ++i) result += v[i];
    return result;
}

// -- Calling templates and threads --------------------------------------------------------------------------------

// f(Storage{}) for the element type of a matrix.
template <typename F>
static inline void with_storage(Dtype dtype, F f) {
    switch (dtype) {
        case Dtype::float64: return f(double{});
        case Dtype::float32: return f(float{});
        case Dtype::bfloat16: return f(BFloat16{});
        case Dtype::float16: return f(Float16{});
    }
}

// f(Real{}) for a dtype that is float32 or float64.
template <typename F>
static inline void with_real(Dtype dtype, F f) {
    if (dtype == Dtype::float64) {
        f(double{});
    } else {
        f(float{});
    }
}

// f(i) for each i below count. What it computes for one i must not depend on the others.
template <typename F>
static inline void parallel_for(int64_t count, int num_threads, F f) {
    if (num_threads <= 1 || count <= 1) {
        for (int64_t i = 0; i < count; ++i) f(i);
        return;
    }
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t i = 0; i < count; ++i) f(i);
}

}  // namespace gspo::cpu::GSPO_ISA
