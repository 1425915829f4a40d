// What every vector path offers: one table of functions, filled by kernels.cpp once for each path.
#pragma once
#include <cstdint>

namespace powertrain {

// One tensor of an update, flat: fp32 or 16 bits, as `Formats` says. Absent ones are null.
struct Operands {
    void* param;
    const void* grad;
    void* first;   // momentum, first moment, or sum of squares
    void* second;  // second moment
    void* out;     // where the new values go as well, in the format to compute in
};

struct Formats {
    int param, grad, state, out;
};

// The numbers of one step, computed in double by the caller. `scale` multiplies every gradient before anything else.
struct Adam { float scale, beta1, beta2, one_minus_beta1, one_minus_beta2, eps, decay, shrink, step_size, root_bias2; };
struct Lion { float scale, lr, beta1, beta2, one_minus_beta1, one_minus_beta2, shrink; };
struct Adagrad { float scale, rate, eps, decay; };
struct Momentum { float scale, lr, momentum, one_minus_damping, decay; int nesterov, first_time, has_momentum; };
struct Lamb { float scale, beta1, beta2, one_minus_beta1, one_minus_beta2, eps, decay, bias1, root_bias2; };

struct Table {
    void (*adam)(const Adam&, const Operands&, const Formats&, int64_t begin, int64_t end);
    void (*lion)(const Lion&, const Operands&, const Formats&, int64_t begin, int64_t end);
    void (*adagrad)(const Adagrad&, const Operands&, const Formats&, int64_t begin, int64_t end);
    void (*momentum)(const Momentum&, const Operands&, const Formats&, int64_t begin, int64_t end);
    // Moments, and the squares of parameter and direction added up: sums[0], sums[1].
    void (*lamb_moments)(const Lamb&, const Operands&, const Formats&, int64_t begin, int64_t end, double* sums);
    void (*lamb_apply)(const Lamb&, float rate, const Operands&, const Formats&, int64_t begin, int64_t end);
    double (*sum_of_squares)(const void* values, int format, int64_t begin, int64_t end);
    void (*combine)(void* to, const void* const* terms, int count, int format, int64_t begin, int64_t end, int how);
    // Blocks begin..end of `block` elements; bits 8 or 4.
    void (*quantize)(const void* from, int format, uint8_t* to, float* scales, int bits, int block, int64_t begin,
                     int64_t end);
    void (*dequantize)(const uint8_t* from, const float* scales, void* to, int format, int bits, int block,
                       int64_t begin, int64_t end, int add);
};

namespace plain { const Table& table(); }
namespace avx2 { const Table& table(); }
namespace avx512 { const Table& table(); }

}  // namespace powertrain
