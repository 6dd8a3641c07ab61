#include "controls.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "emulator.h"

namespace emulation {
namespace {

constexpr const char* kOrders[] = {"forward", "reversed", "shuffled"};

Order order_named(const std::string& name) {
    for (int i = 0; i < 3; ++i) {
        if (name == kOrders[i]) return static_cast<Order>(i);
    }
    throw std::invalid_argument("an order is forward, reversed or shuffled, got '" + name + "'");
}

pybind11::dict configure(int multiprocessors, const std::string& blocks, const std::string& threads,
                         uint64_t seed, uint8_t shared_fill) {
    const Settings wanted = {multiprocessors, order_named(blocks), order_named(threads), seed, shared_fill};
    const Settings before = std::exchange(settings(), wanted);
    pybind11::dict arguments;
    arguments["multiprocessors"] = before.multiprocessors;
    arguments["block_order"] = kOrders[static_cast<int>(before.blocks)];
    arguments["thread_order"] = kOrders[static_cast<int>(before.threads)];
    arguments["seed"] = before.seed;
    arguments["shared_fill"] = before.shared_fill;
    return arguments;
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
    module.def("configure", configure, "Returns the arguments that would undo it", pybind11::kw_only(),
               "multiprocessors"_a, "block_order"_a, "thread_order"_a, "seed"_a, "shared_fill"_a);
    module.def("launches", logged, "(kernel, grid, block, bytes of shared memory) of each, in order");
    module.def("clear_launches", [] { launches().clear(); });
}

}  // namespace emulation
