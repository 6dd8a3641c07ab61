#include "controls.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "emulator.h"

namespace emulation {
namespace {

Order order_named(const std::string& name) {
    if (name == "forward") return Order::kForward;
    if (name == "reversed") return Order::kReversed;
    if (name == "shuffled") return Order::kShuffled;
    throw std::invalid_argument("an order is forward, reversed or shuffled, got '" + name + "'");
}

void configure(int multiprocessors, const std::string& blocks, const std::string& threads, uint64_t seed,
               uint8_t shared_fill) {
    settings() = {multiprocessors, order_named(blocks), order_named(threads), seed, shared_fill};
}

using Size = std::tuple<unsigned, unsigned, unsigned>;

std::vector<std::tuple<std::string, Size, Size, size_t>> logged() {
    std::vector<std::tuple<std::string, Size, Size, size_t>> rows;
    for (const Launch& launch : launches()) {
        const dim3 grid = launch.grid, block = launch.block;
        rows.push_back(
            {launch.kernel, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, launch.shared_bytes});
    }
    return rows;
}

}  // namespace

void bind_controls(pybind11::module_& module) {
    using namespace pybind11::literals;
    module.def("configure", configure, pybind11::kw_only(), "multiprocessors"_a, "block_order"_a,
               "thread_order"_a, "seed"_a, "shared_fill"_a);
    module.def("launches", logged, "(kernel, grid, block, bytes of shared memory) of each, in order");
    module.def("clear_launches", [] { launches().clear(); });
}

}  // namespace emulation
