// Functions that can stop in the middle and go on later, all on one operating system thread.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace emulation {

/// One function on a stack of its own.
class Fibre {
  public:
    Fibre(char* stack, size_t bytes) : stack_(stack), bytes_(bytes) {}

    /// Get ready to call entry(argument). What ran here before is forgotten, finished or not.
    void start(void (*entry)(void*), void* argument);

    /// Go on until the function suspends or returns. From outside of any fibre.
    void resume();

    /// Back to who called `resume`, from inside the fibre that runs.
    static void suspend();

  private:
    static void run();
    static void leave(bool for_good);

    char* stack_;
    size_t bytes_;
    void* position_ = nullptr;    // the stack pointer while it does not run
    void* fake_stack_ = nullptr;  // AddressSanitizer's
    void (*entry_)(void*) = nullptr;
    void* argument_ = nullptr;
};

/// Fibres with stacks that end at inaccessible pages.
class FibrePool {
  public:
    FibrePool() = default;
    FibrePool(const FibrePool&) = delete;
    FibrePool& operator=(const FibrePool&) = delete;
    ~FibrePool();

    /// At least `count` fibres. Stacks are used again.
    std::vector<Fibre>& at_least(size_t count);

  private:
    std::vector<Fibre> fibres_;
    std::vector<char*> stacks_;
};

}  // namespace emulation
