// Turns an illegal address inside a kernel into a failed launch with a report, as a card does.
#pragma once

namespace tokenspeed::emulator {

// While it lives, SIGSEGV and SIGBUS on a kernel's thread end the launch; others go to the handlers installed before.
class FaultGuard {
  public:
    FaultGuard();
    ~FaultGuard();
    FaultGuard(const FaultGuard&) = delete;
    FaultGuard& operator=(const FaultGuard&) = delete;
};

}  // namespace tokenspeed::emulator
