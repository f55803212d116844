// A rank's end of an exchange in host memory: threads of one process, or processes that share it.
#pragma once

#include <memory>
#include <span>

#include "core/exchange.hpp"

namespace sonicmoe {

std::unique_ptr<ExchangePort> make_host_exchange(const ExchangeShape& shape, int rank,
                                                 std::span<void* const> buffers,
                                                 double timeout_seconds);

/// For tests: called after every wait of every rank; null for nothing. Set while no operation runs.
void set_pause_after_waits(void (*pause)(int rank));

}  // namespace sonicmoe
