// The module that registers the emulated operators: csrc/*/cuda.cu are linked into it. It also shows how
// their launchers cut the work.
#include "attention_terms/launch_plan.h"
#include "controls.h"

PYBIND11_MODULE(_emulated_cuda, module) {
    using namespace pybind11::literals;
    emulation::bind_controls(module);
    module.def("forward_splits", attbalance::forward_splits, "rows"_a, "tokens"_a, "multiprocessors"_a);
    module.def("backward_tile", attbalance::backward_tile, "rows"_a, "tokens"_a, "multiprocessors"_a);
    module.def("lane_elements", attbalance::lane_elements, "dim"_a);
}
