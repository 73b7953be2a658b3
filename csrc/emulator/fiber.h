// A fiber: a stack of its own and a place to continue from. Switching costs a few nanoseconds on x86-64; elsewhere
// ucontext.
#pragma once
#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace tokenspeed::emulator {

// A stack with an inaccessible page below it, so that an overflow faults instead of corrupting a neighbour.
class FiberStack {
  public:
    FiberStack();
    ~FiberStack();
    FiberStack(const FiberStack&) = delete;
    FiberStack& operator=(const FiberStack&) = delete;

    char* bottom() const { return bottom_; }
    // Where it starts: stacks begin at different cache lines, or every switch would evict the last one's.
    char* top() const { return bottom_ + kBytes - colour_; }
    static constexpr size_t kBytes = 256 * 1024;

  private:
    char* mapping_;
    char* bottom_;
    size_t colour_;
};

struct Fiber {
    FiberStack* stack = nullptr;  // null for the thread that runs the scheduler
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
    // What AddressSanitizer must know about this stack.
    void* fake_stack = nullptr;
    const void* sanitizer_bottom = nullptr;
    size_t sanitizer_size = 0;
};

// Makes the next switch to `fiber` start `entry` on `stack`. `entry` never returns; it calls fiber_started() first.
void fiber_prepare(Fiber& fiber, FiberStack& stack, void (*entry)());
void fiber_started(Fiber& from);

// Continues `to`; returns when somebody switches back to `from`.
void fiber_switch(Fiber& from, Fiber& to);

}  // namespace tokenspeed::emulator
