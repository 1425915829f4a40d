// What Python calls: checks nothing (kernels.py has), spreads the work over threads, and lets other Python run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <powertrain/paths.h>
#include <powertrain/threads.h>
#include "table.h"
#include <algorithm>

namespace py = pybind11;
using namespace powertrain;

using Addresses = std::vector<uint64_t>;
using Counts = std::vector<int64_t>;

static const int64_t kGrain = 1 << 14;  // elements a thread takes at the least: fewer are done before it is awake

static const Table& table_of(int path) {
#if defined(__x86_64__)
    if (path == 2) return avx512::table();
    if (path == 1) return avx2::table();
#endif
    return plain::table();
}

template <class T = void>
static T* at(uint64_t address) { return reinterpret_cast<T*>(address); }

// Several tensors as one long row of elements, cut between threads wherever that may be.
class Row {
  public:
    explicit Row(const Counts& counts) : starts_(1, 0) {
        for (int64_t count : counts) starts_.push_back(starts_.back() + count);
    }

    // Call work(tensor, begin, end) for each piece of a tensor, in threads.
    template <class Work>
    void each(int threads, const Work& work) const {
        parallel(starts_.back(), kGrain, threads, [&](int64_t begin, int64_t end) {
            size_t index = size_t(std::upper_bound(starts_.begin(), starts_.end(), begin) - starts_.begin() - 1);
            for (; begin < end; ++index) {
                const int64_t stop = end < starts_[index + 1] ? end : starts_[index + 1];
                if (stop > begin) work(int(index), begin - starts_[index], stop - starts_[index]);
                begin = stop;
            }
        });
    }

  private:
    std::vector<int64_t> starts_;
};

struct Group {
    Addresses params, grads, firsts, seconds, outs;
    Counts counts;
    Formats formats;

    Operands operator[](int index) const {
        const auto of = [index](const Addresses& all) { return all.empty() ? nullptr : at(all[size_t(index)]); };
        return {of(params), of(grads), of(firsts), of(seconds), of(outs)};
    }
};

static Group group(const py::dict& given) {
    const auto formats = given["formats"].cast<std::vector<int>>();
    return {given["params"].cast<Addresses>(),  given["grads"].cast<Addresses>(), given["firsts"].cast<Addresses>(),
            given["seconds"].cast<Addresses>(), given["outs"].cast<Addresses>(),  given["counts"].cast<Counts>(),
            {formats[0], formats[1], formats[2], formats[3]}};
}

template <class Numbers>
static void update(void (*rule)(const Numbers&, const Operands&, const Formats&, int64_t, int64_t), const Group& all,
                   const Numbers& numbers, int threads) {
    py::gil_scoped_release released;
    Row(all.counts).each(threads, [&](int index, int64_t begin, int64_t end) {
        rule(numbers, all[index], all.formats, begin, end);
    });
}

// Pieces of a fixed length, so that a sum does not depend on how many threads there are.
static const int64_t kPiece = 1 << 16;

template <class Work>
static std::vector<double> sums(const Counts& counts, int width, int threads, const Work& work) {
    struct Piece { int tensor; int64_t begin, end; };
    std::vector<Piece> pieces;
    for (size_t index = 0; index < counts.size(); ++index)
        for (int64_t begin = 0; begin < counts[index]; begin += kPiece)
            pieces.push_back({int(index), begin, std::min(begin + kPiece, counts[index])});
    std::vector<double> parts(pieces.size() * size_t(width)), result(counts.size() * size_t(width));
    parallel(int64_t(pieces.size()), 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            work(pieces[size_t(i)].tensor, pieces[size_t(i)].begin, pieces[size_t(i)].end, &parts[size_t(i * width)]);
    });
    for (size_t i = 0; i < pieces.size(); ++i)
        for (int j = 0; j < width; ++j) result[size_t(pieces[i].tensor * width + j)] += parts[i * size_t(width) + size_t(j)];
    return result;
}

PYBIND11_MODULE(powertrain_cpu_kernels, m) {
    m.doc() = "Kernels of the processor; powertrain_cpu.kernels is their Python side.";
    m.def("widest_path", &widest_path);

    m.def("adam", [](const py::dict& g, float scale, double beta1, double beta2, float eps, float decay, float shrink,
                     float step_size, float root_bias2, int threads, int path) {
        const Adam numbers = {scale, float(beta1), float(beta2), float(1 - beta1), float(1 - beta2), eps,
                              decay, shrink, step_size, root_bias2};
        update(table_of(path).adam, group(g), numbers, threads);
    });
    m.def("lion", [](const py::dict& g, float scale, float lr, double beta1, double beta2, float shrink, int threads,
                     int path) {
        const Lion numbers = {scale, lr, float(beta1), float(beta2), float(1 - beta1), float(1 - beta2), shrink};
        update(table_of(path).lion, group(g), numbers, threads);
    });
    m.def("adagrad", [](const py::dict& g, float scale, float rate, float eps, float decay, int threads, int path) {
        update(table_of(path).adagrad, group(g), Adagrad{scale, rate, eps, decay}, threads);
    });
    m.def("momentum", [](const py::dict& g, float scale, float lr, float momentum, float one_minus_damping, float decay,
                         bool nesterov, bool first_time, int threads, int path) {
        const Group all = group(g);
        const Momentum numbers = {scale, lr, momentum, one_minus_damping, decay, nesterov, first_time,
                                  !all.firsts.empty()};
        update(table_of(path).momentum, all, numbers, threads);
    });
    m.def("lamb_moments", [](const py::dict& g, float scale, double beta1, double beta2, float eps, float decay,
                             float bias1, float root_bias2, int threads, int path) {
        const Group all = group(g);
        const Lamb numbers = {scale, float(beta1), float(beta2), float(1 - beta1), float(1 - beta2), eps, decay, bias1,
                              root_bias2};
        const auto rule = table_of(path).lamb_moments;
        py::gil_scoped_release released;
        return sums(all.counts, 2, threads, [&](int index, int64_t begin, int64_t end, double* to) {
            rule(numbers, all[index], all.formats, begin, end, to);
        });
    });
    m.def("lamb_apply", [](const py::dict& g, const std::vector<float>& rates, double beta1, double beta2, float eps,
                           float decay, float bias1, float root_bias2, int threads, int path) {
        const Group all = group(g);
        const Lamb numbers = {1, float(beta1), float(beta2), float(1 - beta1), float(1 - beta2), eps, decay, bias1,
                              root_bias2};
        const auto rule = table_of(path).lamb_apply;
        py::gil_scoped_release released;
        Row(all.counts).each(threads, [&](int index, int64_t begin, int64_t end) {
            rule(numbers, rates[size_t(index)], all[index], all.formats, begin, end);
        });
    });
    m.def("sums_of_squares", [](const Addresses& values, const Counts& counts, int format, int threads, int path) {
        const auto rule = table_of(path).sum_of_squares;
        py::gil_scoped_release released;
        return sums(counts, 1, threads, [&](int index, int64_t begin, int64_t end, double* to) {
            *to = rule(at(values[size_t(index)]), format, begin, end);
        });
    });
    m.def("combine", [](uint64_t to, const Addresses& terms, int64_t count, int format, int how, int threads, int path) {
        std::vector<const void*> places;
        for (uint64_t term : terms) places.push_back(at(term));
        const auto rule = table_of(path).combine;
        py::gil_scoped_release released;
        parallel(count, kGrain, threads, [&](int64_t begin, int64_t end) {
            rule(at(to), places.data(), int(places.size()), format, begin, end, how);
        });
    });
    m.def("quantize", [](uint64_t from, int format, uint64_t to, uint64_t scales, int bits, int block, int64_t blocks,
                         int threads, int path) {
        const auto rule = table_of(path).quantize;
        py::gil_scoped_release released;
        parallel(blocks, kGrain / block, threads, [&](int64_t begin, int64_t end) {
            rule(at(from), format, at<uint8_t>(to), at<float>(scales), bits, block, begin, end);
        });
    });
    m.def("dequantize", [](uint64_t from, uint64_t scales, uint64_t to, int format, int bits, int block, int64_t blocks,
                           bool add, int threads, int path) {
        const auto rule = table_of(path).dequantize;
        py::gil_scoped_release released;
        parallel(blocks, kGrain / block, threads, [&](int64_t begin, int64_t end) {
            rule(at<uint8_t>(from), at<float>(scales), at(to), format, bits, block, begin, end, add);
        });
    });
}
