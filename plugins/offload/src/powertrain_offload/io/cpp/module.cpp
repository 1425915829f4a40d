// What Python calls; io/native.py is the Python side.
#include <pybind11/pybind11.h>
#include "alignment.h"
#include "pool.h"
#include "ring.h"

namespace py = pybind11;
using namespace powertrain;

// In a process that was forked off, the threads are not there, and locks may be held by those that were: there,
// everything is left as it lies.
template <typename Thing>
static std::shared_ptr<Thing> owned(Thing* thing) {
    const pid_t owner = getpid();
    return std::shared_ptr<Thing>(thing, [owner](Thing* each) {
        if (getpid() == owner) delete each;
    });
}

// A transfer and the hold on its memory, which only Python's threads may let go of.
class Handle {
  public:
    Handle(const py::object& memory, const std::shared_ptr<const File>& file, bool writes, uint64_t offset) {
        if (PyObject_GetBuffer(memory.ptr(), &held_, writes ? PyBUF_SIMPLE : PyBUF_WRITABLE) != 0)
            throw py::error_already_set();
        auto* place = static_cast<uint8_t*>(held_.buf);
        transfer = owned(new Transfer(file, writes, offset, place, uint64_t(held_.len)));
    }
    Handle(const Handle&) = delete;
    // Memory that the kernel may still write to is better lost than given to others.
    ~Handle() {
        if (transfer->done()) release();
    }

    void release() {
        if (held_.obj) PyBuffer_Release(&held_);
    }

    // In turns, so that signals (Ctrl-C) are seen to.
    void wait() {
        for (;;) {
            {
                py::gil_scoped_release released;
                if (transfer->wait_for(std::chrono::milliseconds(100))) break;
            }
            if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        }
        release();
    }

    bool done() {
        if (!transfer->done()) return false;
        release();
        return true;
    }

    py::object failure() {
        if (!transfer->failed()) return py::none();
        const Failure failure = transfer->failure();
        return py::make_tuple(failure.code, failure.position, failure.part, failure.offset);
    }

    std::shared_ptr<Transfer> transfer;

  private:
    Py_buffer held_{};
};

static std::shared_ptr<Engine> make_ring(int depth, uint64_t block) {
#if defined(POWERTRAIN_URING)
    return owned<Engine>(new Ring(depth, block));
#else
    throw std::runtime_error("built without io_uring: <linux/io_uring.h> is missing or older than Linux 5.7");
#endif
}

PYBIND11_MODULE(powertrain_file_engines, m) {
    m.doc() = "Moves bytes between memory and files, past the page cache.";
    m.def("direct_alignment", [](int file, uint64_t otherwise) {
        const auto found = direct_alignment(file, otherwise);
        return py::make_tuple(found.first, found.second);
    });

    py::class_<File, std::shared_ptr<File>>(m, "File", py::module_local())
        .def(py::init([](const py::list& parts, uint64_t stripe) {
                 auto file = std::make_shared<File>();
                 file->stripe = stripe;
                 for (const auto& each : parts) {
                     const auto part = py::cast<py::tuple>(each);
                     file->parts.push_back({part[0].cast<int>(), part[1].cast<int>(), part[2].cast<uint64_t>(),
                                            part[3].cast<uint64_t>()});
                 }
                 return file;
             }),
             py::arg("parts"), py::arg("stripe"));

    py::class_<Handle>(m, "Handle", py::module_local())
        .def("wait", &Handle::wait)
        .def("done", &Handle::done)
        .def("failure", &Handle::failure);

    py::class_<Engine, std::shared_ptr<Engine>>(m, "Engine", py::module_local())
        .def("start",
             [](Engine& engine, const std::shared_ptr<File>& file, bool writes, uint64_t offset,
                const py::object& memory) {
                 auto handle = std::unique_ptr<Handle>(new Handle(memory, file, writes, offset));
                 if (handle->transfer->length) engine.start(handle->transfer);
                 return handle;
             })
        .def("stop", [](Engine& engine) {
            if (engine.foreign()) return;
            py::gil_scoped_release released;
            engine.stop();
        });
    m.def("ring", make_ring, py::arg("depth"), py::arg("block"));
    m.def(
        "pool",
        [](int threads, uint64_t block) -> std::shared_ptr<Engine> { return owned<Engine>(new Pool(threads, block)); },
        py::arg("threads"), py::arg("block"));
}
