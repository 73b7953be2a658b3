#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace tokenspeed::emulator {

FiberStack::FiberStack() {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* mapping =
        mmap(nullptr, kBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    mapping_ = static_cast<char*>(mapping);
    bottom_ = mapping_ + page;
    static size_t made = 0;
    colour_ = made++ % 48 * 64;
    mprotect(mapping_, page, PROT_NONE);
}

FiberStack::~FiberStack() {
    munmap(mapping_, kBytes + static_cast<size_t>(bottom_ - mapping_));
}

#if defined(__x86_64__)

// Saves the callee-saved registers and the stack pointer, then takes over those of the other fiber.
__attribute__((naked, noinline)) static void switch_stacks(void** /*save*/, void* /*load*/) {
    asm volatile(
        "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
        "movq %rsp, (%rdi)\n\t"
        "movq %rsi, %rsp\n\t"
        "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\t"
        "ret");
}

static void prepare_stack(Fiber& fiber, void (*entry)()) {
    auto** top = reinterpret_cast<void**>(fiber.stack->top());
    *--top = nullptr;  // keeps the stack 16-byte aligned at the entry and ends a backtrace
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    fiber.stack_pointer = top;
}

static void swap(Fiber& from, Fiber& to) {
    switch_stacks(&from.stack_pointer, to.stack_pointer);
}

#else

static void prepare_stack(Fiber& fiber, void (*entry)()) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack->bottom();
    fiber.context.uc_stack.ss_size = FiberStack::kBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
}

static void swap(Fiber& from, Fiber& to) {
    swapcontext(&from.context, &to.context);
}

#endif

void fiber_prepare(Fiber& fiber, FiberStack& stack, void (*entry)()) {
    fiber.stack = &stack;
    fiber.fake_stack = nullptr;
    fiber.sanitizer_bottom = stack.bottom();
    fiber.sanitizer_size = FiberStack::kBytes;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack.bottom(), FiberStack::kBytes);  // whoever used it before may have left redzones
#endif
    prepare_stack(fiber, entry);
}

void fiber_started([[maybe_unused]] Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &from.sanitizer_bottom, &from.sanitizer_size);
#endif
}

void fiber_switch(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.fake_stack, to.sanitizer_bottom, to.sanitizer_size);
    swap(from, to);
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#else
    swap(from, to);
#endif
}

}  // namespace tokenspeed::emulator
