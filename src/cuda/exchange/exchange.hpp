// A rank's end of an exchange on a GPU: the steps of ExchangePort as kernels.
#pragma once

#include <memory>
#include <span>

#include "core/check.hpp"
#include "core/exchange.hpp"

namespace sonicmoe::cuda {

std::unique_ptr<ExchangePort> make_exchange(const Check& check, const Context& context,
                                            const ExchangeShape& shape, int rank,
                                            std::span<void* const> buffers, double timeout_seconds);

}  // namespace sonicmoe::cuda
