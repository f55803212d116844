// Integer arithmetic that every backend's sizes need.
#pragma once

#include <cstdint>

namespace sonicmoe {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

}  // namespace sonicmoe
