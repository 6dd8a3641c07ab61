#include "fibre.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

#if !defined(__x86_64__) && !defined(EMULATION_UCONTEXT)
#define EMULATION_UCONTEXT
#endif

#ifdef EMULATION_UCONTEXT
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define __sanitizer_start_switch_fiber(...)
#define __sanitizer_finish_switch_fiber(...)
#define ASAN_UNPOISON_MEMORY_REGION(...)
#endif

namespace emulation {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

Fibre* running = nullptr;
void* outside = nullptr;  // the position of who resumed it
[[maybe_unused]] const void* outside_stack = nullptr;
[[maybe_unused]] size_t outside_bytes = 0;

}  // namespace

#ifdef EMULATION_UCONTEXT

// Portable, but with two system calls a switch. A position is the address of a context.
namespace {

void switch_stack(void** position, void* to) {
    ucontext_t here;
    *position = &here;
    swapcontext(&here, static_cast<ucontext_t*>(to));
}

void* prepare_stack(char* stack, size_t bytes, void (*run)()) {
    auto* context = reinterpret_cast<ucontext_t*>(stack);
    getcontext(context);
    context->uc_stack.ss_sp = stack + sizeof(ucontext_t);
    context->uc_stack.ss_size = bytes - sizeof(ucontext_t);
    context->uc_link = nullptr;
    makecontext(context, run, 0);
    return context;
}

}  // namespace

#else

// Push the registers that a call must keep, change stacks, pop them there. A position is a stack pointer.
extern "C" void emulation_switch_stack(void** position, void* to);
asm(R"(
    .text
    .local emulation_switch_stack
    .type emulation_switch_stack, @function
emulation_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emulation_switch_stack, .-emulation_switch_stack
)");

namespace {

void switch_stack(void** position, void* to) {
    emulation_switch_stack(position, to);
}

void* prepare_stack(char* stack, size_t bytes, void (*run)()) {
    // Six registers, then where `ret` goes; afterwards the stack is as just after a call.
    void** top = reinterpret_cast<void**>(stack + bytes) - 8;
    for (int i = 0; i < 8; ++i) top[i] = nullptr;
    top[6] = reinterpret_cast<void*>(run);
    return top;
}

}  // namespace

#endif

void Fibre::start(void (*entry)(void*), void* argument) {
    ASAN_UNPOISON_MEMORY_REGION(stack_, bytes_);  // frames that were left in the middle
    entry_ = entry;
    argument_ = argument;
    position_ = prepare_stack(stack_, bytes_, run);
}

void Fibre::resume() {
    running = this;
    [[maybe_unused]] void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, stack_, bytes_);
    switch_stack(&outside, position_);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void Fibre::suspend() {
    leave(false);
}

void Fibre::run() {
    __sanitizer_finish_switch_fiber(nullptr, &outside_stack, &outside_bytes);
    running->entry_(running->argument_);
    leave(true);
}

void Fibre::leave([[maybe_unused]] bool for_good) {
    Fibre* const self = running;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &self->fake_stack_, outside_stack, outside_bytes);
    switch_stack(&self->position_, outside);
    __sanitizer_finish_switch_fiber(self->fake_stack_, &outside_stack, &outside_bytes);
}

std::vector<Fibre>& FibrePool::at_least(size_t count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    while (fibres_.size() < count) {
        void* memory = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        stacks_.push_back(static_cast<char*>(memory));
        if (mprotect(memory, page, PROT_NONE) != 0) throw std::bad_alloc();
        fibres_.emplace_back(stacks_.back() + page, kStackBytes);
    }
    return fibres_;
}

FibrePool::~FibrePool() {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    for (char* stack : stacks_) munmap(stack, page + kStackBytes);
}

}  // namespace emulation
