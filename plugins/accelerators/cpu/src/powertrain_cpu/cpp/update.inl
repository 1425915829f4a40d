// Optimizer updates: each element is read once and written once, whatever is done to it in between.
//
// A stretch of every operand is brought to fp32 (where it is not, already), a rule's loop goes over it, and what has
// changed is rounded back. Formulas and their order are torch's own; the tests hold them to a float64 computation.
#pragma once
#include <powertrain/vector.inl>
#include "table.h"
#include <cmath>

namespace powertrain {
namespace POWERTRAIN_PATH {

// What a rule writes.
enum Writes { kParam = 1, kFirst = 2, kSecond = 4 };

// Elements that are gone through at a time: few enough that the processor reads ahead in every operand at once.
static constexpr int64_t kStretch = 128;

template <int writes, class Rule>
static inline void sweep(const Operands& t, const Formats& f, int64_t begin, int64_t end, const Rule& rule) {
    alignas(64) float param_room[kStretch], grad_room[kStretch], first_room[kStretch], second_room[kStretch];
    for (int64_t start = begin; start < end; start += kStretch) {
        const int64_t count = end - start < kStretch ? end - start : kStretch;
        float* param = const_cast<float*>(loaded(t.param, f.param, start, count, param_room));
        const float* grad = loaded(t.grad, f.grad, start, count, grad_room);
        float* first = t.first ? const_cast<float*>(loaded(t.first, f.state, start, count, first_room)) : first_room;
        float* second = t.second ? const_cast<float*>(loaded(t.second, f.state, start, count, second_room)) : second_room;
        rule(param, grad, first, second, count);
        if (writes & kParam) {
            stored(t.param, f.param, start, count, param);
            if (t.out) stored(t.out, f.out, start, count, param);
        }
        if ((writes & kFirst) && t.first) stored(t.first, f.state, start, count, first);
        if ((writes & kSecond) && t.second) stored(t.second, f.state, start, count, second);
    }
}

// a * b + c, rounded once: where the two may cancel, the rounding of the product would be all that is left.
static inline float fused(float a, float b, float c) {
#if defined(__FMA__)
    return __builtin_fmaf(a, b, c);
#else
    return float(double(a) * double(b) + double(c));
#endif
}

// A gradient with decay; none of an infinite parameter is none.
static inline float pulled(float grad, float decay, float param) {
    return decay == 0.0f ? grad : fused(decay, param, grad);
}

// From `a` to `b`, from whichever end is nearer, as torch.lerp does it.
static inline float blend(float a, float b, float weight) {
    return weight < 0.5f ? fused(weight, b - a, a) : fused(weight - 1.0f, b - a, b);
}

using Values = float* __restrict;
using Given = const float* __restrict;

static void adam(const Adam& a, const Operands& t, const Formats& f, int64_t begin, int64_t end) {
    const Adam c = a;
    sweep<kParam | kFirst | kSecond>(t, f, begin, end, [c](Values p, Given grad, Values m, Values v, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            const float g = pulled(grad[i] * c.scale, c.decay, p[i]);
            const float first = blend(m[i], g, c.one_minus_beta1);
            const float second = c.beta2 * v[i] + c.one_minus_beta2 * (g * g);
            m[i] = first;
            v[i] = second;
            p[i] = p[i] * c.shrink - (c.step_size * first) / (std::sqrt(second) / c.root_bias2 + c.eps);
        }
    });
}

static void lion(const Lion& a, const Operands& t, const Formats& f, int64_t begin, int64_t end) {
    const Lion c = a;
    sweep<kParam | kFirst>(t, f, begin, end, [c](Values p, Given grad, Values m, Values, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            const float g = grad[i] * c.scale;
            const float blend = c.beta1 * m[i] + c.one_minus_beta1 * g;
            const float sign = float(blend > 0.0f) - float(blend < 0.0f);  // of NaN 0, as torch has it
            p[i] = p[i] * c.shrink - c.lr * sign;
            m[i] = c.beta2 * m[i] + c.one_minus_beta2 * g;
        }
    });
}

static void adagrad(const Adagrad& a, const Operands& t, const Formats& f, int64_t begin, int64_t end) {
    const Adagrad c = a;
    sweep<kParam | kFirst>(t, f, begin, end, [c](Values p, Given grad, Values sum, Values, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            const float g = pulled(grad[i] * c.scale, c.decay, p[i]);
            const float total = sum[i] + g * g;
            sum[i] = total;
            p[i] = p[i] - (c.rate * g) / (std::sqrt(total) + c.eps);
        }
    });
}

static void momentum(const Momentum& a, const Operands& t, const Formats& f, int64_t begin, int64_t end) {
    const Momentum c = a;
    if (!c.has_momentum) {
        sweep<kParam>(t, f, begin, end, [c](Values p, Given grad, Values, Values, int64_t count) {
            for (int64_t i = 0; i < count; ++i) p[i] = p[i] - c.lr * (pulled(grad[i] * c.scale, c.decay, p[i]));
        });
        return;
    }
    sweep<kParam | kFirst>(t, f, begin, end, [c](Values p, Given grad, Values m, Values, int64_t count) {
        const float keep = c.first_time ? 0.0f : c.momentum, take = c.first_time ? 1.0f : c.one_minus_damping;
        const float look = c.nesterov ? c.momentum : 1.0f, own = c.nesterov ? 1.0f : 0.0f;
        if (c.first_time) for (int64_t i = 0; i < count; ++i) m[i] = 0.0f;  // what was there means nothing yet
        for (int64_t i = 0; i < count; ++i) {
            const float g = pulled(grad[i] * c.scale, c.decay, p[i]);
            const float moved = keep * m[i] + take * g;
            m[i] = moved;
            p[i] = p[i] - c.lr * (own ? g + look * moved : moved);
        }
    });
}

// The direction of LAMB at one element ("Large Batch Optimization for Deep Learning", You et al., 2019).
static inline float lamb_direction(const Lamb& c, float p, float m, float v) {
    return (m / c.bias1) / (std::sqrt(v) / c.root_bias2 + c.eps) + c.decay * p;
}

// Sums of squares go through this many lanes, in double: a square of fp32 is exact there.
static constexpr int kLanes = 16;

template <class Value>
static inline double squares(int64_t count, const Value& value) {
    double lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) {
            const double x = value(i + lane);
            lanes[lane] += x * x;
        }
    double total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
    for (; i < count; ++i) total += double(value(i)) * double(value(i));
    return total;
}

static void lamb_moments(const Lamb& a, const Operands& t, const Formats& f, int64_t begin, int64_t end, double* sums) {
    const Lamb c = a;
    double params = 0, directions = 0;
    sweep<kFirst | kSecond>(t, f, begin, end, [&](Values p, Given grad, Values m, Values v, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            const float g = grad[i] * c.scale;
            m[i] = blend(m[i], g, c.one_minus_beta1);
            v[i] = c.beta2 * v[i] + c.one_minus_beta2 * (g * g);
        }
        params += squares(count, [p](int64_t i) { return p[i]; });
        directions += squares(count, [&c, p, m, v](int64_t i) { return lamb_direction(c, p[i], m[i], v[i]); });
    });
    sums[0] += params;
    sums[1] += directions;
}

static void lamb_apply(const Lamb& a, float rate, const Operands& t, const Formats& f, int64_t begin, int64_t end) {
    const Lamb c = a;
    sweep<kParam>(t, f, begin, end, [c, rate](Values p, Given, Values m, Values v, int64_t count) {
        for (int64_t i = 0; i < count; ++i) p[i] = p[i] - rate * lamb_direction(c, p[i], m[i], v[i]);
    });
}

static double sum_of_squares(const void* values, int format, int64_t begin, int64_t end) {
    alignas(64) float room[kBlock];
    double total = 0;
    for (int64_t start = begin; start < end; start += kBlock) {
        const int64_t count = end - start < kBlock ? end - start : kBlock;
        const float* x = loaded(values, format, start, count, room);
        total += squares(count, [x](int64_t i) { return x[i]; });
    }
    return total;
}

}  // namespace POWERTRAIN_PATH
}  // namespace powertrain
