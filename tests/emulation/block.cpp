#include "block.h"

#include <algorithm>
#include <map>
#include <stdexcept>

#include "emulator.h"

namespace emulation {
namespace {

const char* name_of(Call call) {
    switch (call) {
        case Call::kSyncThreads: return "__syncthreads";
        case Call::kSyncThreadsOr: return "__syncthreads_or";
        case Call::kSyncThreadsAnd: return "__syncthreads_and";
        case Call::kSyncWarp: return "__syncwarp";
        case Call::kShuffle: return "__shfl_sync";
        case Call::kShuffleUp: return "__shfl_up_sync";
        case Call::kShuffleDown: return "__shfl_down_sync";
        case Call::kShuffleXor: return "__shfl_xor_sync";
        case Call::kBallot: return "__ballot_sync";
        case Call::kAny: return "__any_sync";
        case Call::kAll: return "__all_sync";
    }
    return "?";
}

bool is_shuffle(Call call) {
    return call == Call::kShuffle || call == Call::kShuffleUp || call == Call::kShuffleDown ||
           call == Call::kShuffleXor;
}

bool is_block_wide(Call call) {
    return call == Call::kSyncThreads || call == Call::kSyncThreadsOr || call == Call::kSyncThreadsAnd;
}

/// The lane that a shuffle reads; its own where the source is outside of its segment of `width` lanes.
int source_lane(Call call, int lane, int operand, int width) {
    const int begin = lane & ~(width - 1), end = begin + width;
    int source = lane;
    switch (call) {
        case Call::kShuffle: return begin | (operand & (width - 1));
        case Call::kShuffleUp: source = lane - operand; return source < begin ? lane : source;
        case Call::kShuffleDown: source = lane + operand; return source >= end ? lane : source;
        default: source = lane ^ operand; return source >= end ? lane : source;
    }
}

std::string hexadecimal(unsigned mask) {
    constexpr char digits[] = "0123456789abcdef";
    std::string text = "0x";
    for (int shift = 28; shift >= 0; shift -= 4) text += digits[(mask >> shift) & 15u];
    return text;
}

}  // namespace

Block::Block(FibrePool& fibres, dim3 shape, void (*body)(const void*), const void* arguments,
             std::vector<uint64_t> warps, std::vector<uint64_t> lanes)
    : fibres_(fibres.at_least(volume(shape))),
      shape_(shape),
      body_(body),
      arguments_(arguments),
      warps_(std::move(warps)),
      lanes_(std::move(lanes)),
      threads_(volume(shape)) {}

void Block::run() {
    error_.clear();
    waiting_.assign(warps_.size(), 0);
    for (unsigned i = 0; i < threads_.size(); ++i) {
        threads_[i] = {this, i, State::kReady, Call::kSyncThreads, 0, 0, 0, 0};
        fibres_[i].start(thread_main, &threads_[i]);
    }
    const auto returned = [](const Thread& thread) { return thread.state == State::kReturned; };
    do {
        // Each warp as far as it gets alone: where a barrier is missing, the others are far behind.
        bool progress = false;
        for (const uint64_t warp : warps_) progress |= run_warp(static_cast<unsigned>(warp));
        if (!progress && !release_block()) throw std::runtime_error(deadlock());
    } while (!std::all_of(threads_.begin(), threads_.end(), returned));
}

void Block::thread_main(void* thread) {
    Block& block = *static_cast<Thread*>(thread)->block;
    block.body_(block.arguments_);
    static_cast<Thread*>(thread)->state = State::kReturned;
}

bool Block::run_warp(unsigned warp) {
    bool any = false;
    for (bool progress = true; progress;) {
        progress = false;
        for (const uint64_t lane : lanes_) {
            const unsigned i = warp * kWarp + static_cast<unsigned>(lane);
            if (!exists(i) || threads_[i].state != State::kReady) continue;
            running_ = &threads_[i];
            threadIdx = unravel(i, shape_);
            fibres_[i].resume();
            if (!error_.empty()) throw std::runtime_error(error_);
            progress = any = true;
        }
    }
    return any;
}

int Block::meet_block(Call call, int predicate) {
    Thread& self = *running_;
    self.call = call;
    self.value = predicate != 0;
    wait();
    return static_cast<int>(self.value);
}

/// Let all threads go on if they have arrived at the same barrier.
bool Block::release_block() {
    const Call call = threads_[0].call;
    bool any = false, all = true;
    for (const Thread& thread : threads_) {
        if (thread.state != State::kWaits || thread.call != call || !is_block_wide(call)) return false;
        any = any || thread.value != 0;
        all = all && thread.value != 0;
    }
    for (Thread& thread : threads_) {
        thread.value = call == Call::kSyncThreadsAnd ? all : any;
        thread.state = State::kReady;
    }
    return true;
}

uint64_t Block::meet_warp(Call call, unsigned mask, uint64_t value, int operand, int width) {
    Thread& self = *running_;
    const unsigned lane = self.index % kWarp;
    self.call = call;
    self.mask = mask;
    self.value = value;
    self.operand = operand;
    self.width = width;
    if (!(mask >> lane & 1u)) fail(self, "is not in its own mask " + hexadecimal(mask));
    if (width < 1 || width > 32 || (width & (width - 1))) {
        fail(self, "gives the width " + std::to_string(width));
    }
    self.state = State::kWaits;
    waiting_[self.index / kWarp] |= 1u << lane;
    release_warp(self.index - lane, mask);
    wait();
    return self.value;
}

/// Let the lanes in `mask` of the warp that starts at thread `first` go on if all have arrived.
void Block::release_warp(unsigned first, unsigned mask) {
    const Call call = running_->call;
    unsigned& waiting = waiting_[first / kWarp];
    if (mask & ~waiting) return;
    uint64_t results[kWarp] = {};
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        if ((mask >> lane & 1u) && !waits_at(first + lane, call, mask)) return;
    }
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        if (mask >> lane & 1u) results[lane] = exchange(threads_[first + lane], first);
    }
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        if (!(mask >> lane & 1u)) continue;
        threads_[first + lane].value = results[lane];
        threads_[first + lane].state = State::kReady;
    }
    waiting &= ~mask;
}

/// What this thread gets from its warp, all of whose named lanes have arrived.
uint64_t Block::exchange(const Thread& thread, unsigned first) {
    const unsigned mask = thread.mask;
    if (is_shuffle(thread.call)) {
        const int lane = static_cast<int>(thread.index % kWarp);
        const auto source =
            static_cast<unsigned>(source_lane(thread.call, lane, thread.operand, thread.width));
        if (source >= kWarp || !(mask >> source & 1u)) {
            fail(thread, "reads lane " + std::to_string(source) + ", which its mask " + hexadecimal(mask) +
                             " does not name");
        }
        return threads_[first + source].value;
    }
    unsigned votes = 0;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        if ((mask >> lane & 1u) && threads_[first + lane].value != 0) votes |= 1u << lane;
    }
    switch (thread.call) {
        case Call::kBallot: return votes;
        case Call::kAny: return votes != 0;
        case Call::kAll: return votes == mask;
        default: return 0;
    }
}

void Block::wait() {
    Thread& self = *running_;
    if (is_block_wide(self.call)) self.state = State::kWaits;
    Fibre::suspend();
}

/// Say what this thread does wrong, and never go on with the block.
void Block::fail(const Thread& thread, const std::string& what) {
    error_ = name(thread.index) + " in " + name_of(thread.call) + ": " + what;
    for (;;) Fibre::suspend();
}

bool Block::waits_at(unsigned thread, Call call, unsigned mask) const {
    return exists(thread) && threads_[thread].state == State::kWaits && threads_[thread].call == call &&
           threads_[thread].mask == mask;
}

std::string Block::name(unsigned thread) const {
    const uint3 at = unravel(thread, shape_);
    return "thread (" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) +
           ")";
}

std::string Block::doing(unsigned thread) const {
    if (!exists(thread)) return "does not exist";
    const Thread& it = threads_[thread];
    if (it.state == State::kReturned) return "has returned";
    std::string text = std::string("waits in ") + name_of(it.call);
    if (!is_block_wide(it.call)) text += " with mask " + hexadecimal(it.mask);
    return text;
}

std::string Block::deadlock() const {
    // The lanes that a warp misses say more than the barrier at which the rest of the block waits for it.
    for (const Thread& thread : threads_) {
        if (thread.state != State::kWaits || is_block_wide(thread.call)) continue;
        const unsigned first = thread.index - thread.index % kWarp;
        std::string missing;
        for (unsigned lane = 0; lane < kWarp; ++lane) {
            if (!(thread.mask >> lane & 1u) || waits_at(first + lane, thread.call, thread.mask)) continue;
            if (!missing.empty()) missing += ", ";
            missing += "lane " + std::to_string(lane) + " " + doing(first + lane);
        }
        return name(thread.index) + " " + doing(thread.index) + " for ever: " + missing;
    }
    std::map<std::string, std::pair<unsigned, unsigned>> groups;  // doing: (how many, the first of them)
    for (const Thread& thread : threads_) {
        auto [group, _] = groups.try_emplace(doing(thread.index), 0u, thread.index);
        ++group->second.first;
    }
    std::string text = "a barrier is not reached by all threads:";
    for (const auto& [what, group] : groups) {
        text += (text.back() == ':' ? " " : "; ") + name(group.second) + " " + what;
        if (group.first > 1) text += " (and " + std::to_string(group.first - 1) + " more)";
    }
    return text;
}

}  // namespace emulation
