#include "fault.h"

#include <signal.h>

#include <array>

#include "machine.h"

namespace tokenspeed::emulator {

#if defined(__SANITIZE_ADDRESS__)

// AddressSanitizer says more about a bad address than we can.
FaultGuard::FaultGuard() = default;
FaultGuard::~FaultGuard() = default;

#else

namespace {

struct sigaction previous_segv, previous_bus;
stack_t previous_stack;
alignas(16) std::array<char, 64 * 1024> handler_stack;

void on_fault(int number, siginfo_t* info, void*) {
    if (current_thread == nullptr) {
        // Not a kernel's doing: let the fault happen again under the handler that was there before.
        sigaction(number, number == SIGSEGV ? &previous_segv : &previous_bus, nullptr);
        return;
    }
    const auto* address = static_cast<const char*>(info->si_addr);
    const char* stack = current_thread->fiber.stack->bottom();
    if (address < stack && address >= stack - 4096) {
        machine().fail("stack overflow: a thread has %zu KB", FiberStack::kBytes / 1024);
    }
    for (const auto& block : current_thread->block->cluster->blocks) {
        const auto* shared = reinterpret_cast<const char*>(block->shared->data());
        if (address >= shared && address < shared + SharedMemory::kLimit + 4096) {
            machine().fail("access to shared offset 0x%zx, past the %zu bytes of the block",
                           static_cast<size_t>(address - shared), block->shared->bytes());
        }
    }
    machine().fail("illegal address %p", info->si_addr);
}

}  // namespace

FaultGuard::FaultGuard() {
    stack_t stack{};
    stack.ss_sp = handler_stack.data();
    stack.ss_size = handler_stack.size();
    sigaltstack(&stack, &previous_stack);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    // The handler leaves by switching to the scheduler's stack, so the signal must not stay blocked.
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &previous_segv);
    sigaction(SIGBUS, &action, &previous_bus);
}

FaultGuard::~FaultGuard() {
    sigaction(SIGSEGV, &previous_segv, nullptr);
    sigaction(SIGBUS, &previous_bus, nullptr);
    sigaltstack(&previous_stack, nullptr);
}

#endif

}  // namespace tokenspeed::emulator
