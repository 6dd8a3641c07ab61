#include "emulator.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>

#include "block.h"
#include "fibre.h"
#include "shared_memory.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {
namespace {

thread_local std::string last_error;
std::mutex device;  // one kernel at a time
std::map<const void*, size_t> shared_limits;
Block* running_block = nullptr;

const std::string kNamespace = "attbalance::";

/// The function's name with template arguments, without return type, parameters and our namespace.
std::string name_of(const void* kernel) {
    Dl_info info = {};
    if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr || info.dli_saddr != kernel) {
        throw std::invalid_argument("the emulator finds no name for this kernel: give it external linkage");
    }
    int status = 0;
    const std::unique_ptr<char, decltype(&std::free)> demangled(
        abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status), std::free);
    std::string name = demangled ? demangled.get() : info.dli_sname;
    name.erase(0, name.rfind(' ', name.find_first_of("<(")) + 1);  // the return type; npos + 1 is 0
    for (size_t at; (at = name.find(kNamespace)) != std::string::npos;) name.erase(at, kNamespace.size());
    int depth = 0;
    for (size_t i = 0; i < name.size(); ++i) {
        depth += name[i] == '<' ? 1 : name[i] == '>' ? -1 : 0;
        if (name[i] == '(' && depth == 0) return name.substr(0, i);
    }
    return name;
}

void check_configuration(const cudaLaunchConfig_t& config) {
    const dim3 grid = config.gridDim, block = config.blockDim;
    if (volume(grid) == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        throw std::invalid_argument("invalid grid");
    }
    if (volume(block) == 0 || volume(block) > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64) {
        throw std::invalid_argument("invalid block");
    }
}

void check_shared_bytes(const void* kernel, size_t bytes) {
    const auto found = shared_limits.find(kernel);
    const size_t limit = found == shared_limits.end() ? kSharedByDefault : found->second;
    if (bytes > limit) {
        throw std::invalid_argument(std::to_string(bytes) +
                                    " bytes of shared memory, where the kernel may have " +
                                    std::to_string(limit));
    }
}

void run_grid(const cudaLaunchConfig_t& config, void (*thread)(const void*), const void* arguments) {
    static FibrePool fibres;
    const Settings& with = settings();
    const uint64_t warps = (volume(config.blockDim) + kWarp - 1) / kWarp;
    Block block(fibres, config.blockDim, thread, arguments, arrange(warps, with.threads, with.seed),
                arrange(kWarp, with.threads, with.seed));
    running_block = &block;
    gridDim = config.gridDim;
    blockDim = config.blockDim;
    guard_shared_memory(config.dynamicSmemBytes);
    for (const uint64_t i : arrange(volume(config.gridDim), with.blocks, with.seed)) {
        blockIdx = unravel(i, config.gridDim);
        fill_shared_memory(config.dynamicSmemBytes, with.shared_fill);
        block.run();
        check_shared_memory(config.dynamicSmemBytes);
    }
}

cudaError_t report(cudaError_t error, const std::string& text) {
    last_error = text;
    return error;
}

}  // namespace

Settings& settings() {
    static Settings the;
    return the;
}

std::vector<Launch>& launches() {
    static std::vector<Launch> the;
    return the;
}

std::vector<uint64_t> arrange(uint64_t count, Order order, uint64_t seed) {
    std::vector<uint64_t> indices(count);
    std::iota(indices.begin(), indices.end(), uint64_t{0});
    if (order == Order::kReversed) std::reverse(indices.begin(), indices.end());
    if (order == Order::kShuffled) {
        std::mt19937_64 random(seed);
        for (uint64_t i = count; i > 1; --i) std::swap(indices[i - 1], indices[random() % i]);
    }
    return indices;
}

int meet_block(Call call, int predicate) {
    return running_block->meet_block(call, predicate);
}

uint64_t meet_warp(Call call, unsigned mask, uint64_t value, int operand, int width) {
    return running_block->meet_warp(call, mask, value, operand, width);
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute, int value) {
    if (value < 0 || static_cast<size_t>(value) > kSharedAtMost) {
        return report(cudaErrorInvalidValue, "a block has at most " + std::to_string(kSharedAtMost) +
                                                 " bytes of shared memory, not " + std::to_string(value));
    }
    const std::lock_guard<std::mutex> lock(device);
    shared_limits[kernel] = static_cast<size_t>(value);
    return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*thread)(const void*),
                   const void* arguments) {
    const std::lock_guard<std::mutex> lock(device);
    try {
        check_configuration(config);
        check_shared_bytes(kernel, config.dynamicSmemBytes);
        launches().push_back({name_of(kernel), config.gridDim, config.blockDim, config.dynamicSmemBytes});
        run_grid(config, thread, arguments);
    } catch (const std::invalid_argument& error) {
        return report(cudaErrorInvalidConfiguration, error.what());
    } catch (const std::runtime_error& error) {
        return report(cudaErrorLaunchFailure, "kernel " + launches().back().kernel + ", block (" +
                                                  std::to_string(blockIdx.x) + ", " +
                                                  std::to_string(blockIdx.y) + ", " +
                                                  std::to_string(blockIdx.z) + "): " + error.what());
    }
    return cudaSuccess;
}

}  // namespace emulation

const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : emulation::last_error.c_str();
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = emulation::settings().multiprocessors;
    return cudaSuccess;
}
