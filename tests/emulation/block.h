// The threads of one block, as fibres that take turns and wait for each other.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <vector>

#include "fibre.h"

namespace emulation {

/// Runs blocks of one shape, one after another.
class Block {
  public:
    /// `body(arguments)` is what each thread does. `warps`, `lanes`: in which order they take their turns.
    Block(FibrePool& fibres, dim3 shape, void (*body)(const void*), const void* arguments,
          std::vector<uint64_t> warps, std::vector<uint64_t> lanes);

    /// Raises std::runtime_error, saying which threads wait where, if they do not all return.
    void run();

    /// What the running thread calls; see cuda_runtime.h.
    int meet_block(Call call, int predicate);
    uint64_t meet_warp(Call call, unsigned mask, uint64_t value, int operand, int width);

  private:
    enum class State : uint8_t { kReady, kWaits, kReturned };

    struct Thread {
        Block* block;
        unsigned index;
        State state;
        Call call;  // where it waits, and what it brings:
        unsigned mask;
        int operand;
        int width;
        uint64_t value;  // afterwards: what it gets
    };

    static void thread_main(void* thread);

    bool run_warp(unsigned warp);
    bool release_block();
    void release_warp(unsigned first, unsigned mask);
    uint64_t exchange(const Thread& thread, unsigned first);
    void wait();
    [[noreturn]] void fail(const Thread& thread, const std::string& what);

    bool waits_at(unsigned thread, Call call, unsigned mask) const;
    bool exists(unsigned thread) const { return thread < threads_.size(); }
    std::string name(unsigned thread) const;
    std::string doing(unsigned thread) const;
    std::string deadlock() const;

    std::vector<Fibre>& fibres_;
    dim3 shape_;
    void (*body_)(const void*);
    const void* arguments_;
    std::vector<uint64_t> warps_, lanes_;
    std::vector<Thread> threads_;
    std::vector<unsigned> waiting_;  // for each warp, its lanes that wait for other lanes
    Thread* running_ = nullptr;
    std::string error_;
};

}  // namespace emulation
