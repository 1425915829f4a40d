// What Python calls; shm/communicator.py is the Python side.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <powertrain/paths.h>
#include "engine.h"

namespace py = pybind11;
using namespace powertrain;

static const Work& work_of(int path) {
#if defined(__x86_64__)
    if (path == 2) return avx512::work();
    if (path == 1) return avx2::work();
#endif
    return plain::work();
}

// A piece of the heap, which goes back when Python has let go of it and of all its views.
struct Block {
    std::shared_ptr<Heap> heap;
    uint8_t* place;
    uint64_t bytes;
    ~Block() { heap->release(place, bytes); }
};

PYBIND11_MODULE(powertrain_shared_memory, m) {
    m.doc() = "Collectives between the ranks of one host, through shared memory.";
    m.attr("MAX_RANKS") = kMaxRanks;
    m.attr("EAGER") = kEager;

    py::class_<Block, std::shared_ptr<Block>>(m, "Block", py::module_local(), py::buffer_protocol())
        .def_buffer([](Block& block) {
            return py::buffer_info(block.place, 1, "B", 1, {py::ssize_t(block.bytes)}, {py::ssize_t(1)});
        });

    py::class_<Heap, std::shared_ptr<Heap>>(m, "Heap", py::module_local())
        .def(py::init([](uint64_t size, uint64_t lanes) { return std::make_shared<Heap>(size, lanes_end(lanes)); }),
             py::arg("size"), py::arg("lanes"))
        .def_property_readonly("file", &Heap::file)
        .def_property_readonly("size", &Heap::size)
        .def("contains", [](const Heap& heap, uint64_t address,
                            uint64_t bytes) { return heap.contains(reinterpret_cast<void*>(address), bytes); })
        .def("allocate", [](const std::shared_ptr<Heap>& heap, uint64_t bytes) -> std::shared_ptr<Block> {
            uint8_t* place = heap->allocate(bytes);
            if (!place) return nullptr;
            return std::shared_ptr<Block>(new Block{heap, place, bytes});
        });

    py::class_<Collective, std::shared_ptr<Collective>>(m, "Collective", py::module_local())
        .def_property_readonly("status", [](const Collective& c) { return c.status.load(); })
        .def_property_readonly(
            "seconds", [](const Collective& c) { return std::chrono::duration<double>(c.ended - c.issued).count(); })
        .def_readonly("culprit", &Collective::culprit)
        .def_readonly("message", &Collective::message);

    py::class_<Engine>(m, "Engine", py::module_local())
        .def(py::init([](std::shared_ptr<Heap> heap, int self, int spins) {
                 return new Engine(std::move(heap), self, work_of(widest_path()), spins);
             }),
             py::arg("heap"), py::arg("self"), py::arg("spins"))
        .def("add_peer", &Engine::add_peer, py::arg("file"), py::arg("size"), py::arg("socket"), py::arg("process"))
        .def(
            "issue",
            [](Engine& engine, uint64_t lane, const std::vector<int>& ranks, int me, int operation, int format,
               int reduction, int source, int64_t numel, uint64_t input, uint64_t output, std::vector<int64_t> starts,
               std::vector<int64_t> takes) {
                auto c = std::make_shared<Collective>();
                c->operation = operation, c->format = format, c->reduction = reduction, c->source = source;
                c->numel = numel;
                c->input = reinterpret_cast<const uint8_t*>(input);
                c->output = reinterpret_cast<uint8_t*>(output);
                c->starts = std::move(starts), c->takes = std::move(takes);
                py::gil_scoped_release released;
                return engine.issue(std::move(c), lane, ranks, me);
            })
        .def("wait",
             [](Engine& engine, const std::shared_ptr<Collective>& c, double seconds) {
                 py::gil_scoped_release released;
                 return engine.wait(c, seconds);
             })
        .def("close", &Engine::close, py::call_guard<py::gil_scoped_release>());
}
