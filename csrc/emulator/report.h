// Words for what went wrong: where a thread is, what it waits for, and what it would take.
#pragma once
#include <string>

#include "machine.h"

namespace tokenspeed::emulator {

std::string text(const dim3& size);
std::string block_name(const Block& block);
std::string thread_name(const Thread& thread);

// Every waiting thread of the resident blocks, those that wait for the same thing in one line.
std::string describe_state(const Grid& grid);

}  // namespace tokenspeed::emulator
