// One vector path's table; compiled once for each.
#include "quantize.inl"
#include "update.inl"
#include <powertrain/combine.inl>

namespace powertrain {
namespace POWERTRAIN_PATH {

const Table& table() {
    static const Table functions = {
        adam,           lion,    adagrad,  momentum,  lamb_moments, lamb_apply,
        sum_of_squares, combine, quantize, dequantize,
    };
    return functions;
}

}  // namespace POWERTRAIN_PATH
}  // namespace powertrain
