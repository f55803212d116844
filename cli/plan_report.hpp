// The part of `sonicmoe memory` that plans a whole model on several GPUs.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <optional>
#include <string>

#include "cli/plan.hpp"

namespace sonicmoe::cli {

struct PlanCommand {
  std::optional<std::string> model;  ///< the name of a config.json; without it there is no plan
  std::int64_t gpus = 1;
  std::optional<std::int64_t> fsdp;  ///< all GPUs
  std::optional<std::int64_t> ep;    ///< the advised one
  PlanSettings settings;
};

void add_plan_options(CLI::App& command, PlanCommand& plan);

/// Errors: an option of a plan without --model, and one that is not of a plan beside it.
void check_plan_options(const CLI::App& command, bool has_model);

/// Prints bytes of a rank, traffic and advice for every layout. `gpu_bytes` are those of a GPU.
/// Errors: a file that is no config.json; GPUs, FSDP and EP that do not divide each other; sizes
/// beyond 2^62 bytes.
void print_plan(const PlanCommand& plan, std::size_t gpu_bytes, bool json);

}  // namespace sonicmoe::cli
