// The checks of one operation that others share: moe_layer's are the router's and the experts'.
// All of a call's checks run before anything is computed or written.
#pragma once

#include <new>

#include "core/backend.hpp"
#include "core/check.hpp"
#include "core/log.hpp"
#include "sonicmoe/moe.hpp"
#include "sonicmoe/router.hpp"

namespace sonicmoe {

/// run(check), in the operation's name: what leaves it is an Error that begins with it, also where
/// one of its parts failed or memory ran out. For questions about sizes; operations take the next.
template <class Run>
auto answer(std::string_view operation, const Context& context, Run run) {
  try {
    return run(Check(operation, context));
  } catch (const Error& error) {
    if (error.argument().empty()) throw;
    throw Error(std::string(operation), error);
  } catch (const std::bad_alloc&) {
    throw OutOfMemory(std::string(operation));
  } catch (const std::exception& error) {
    throw Error(std::string(operation) + ": " + error.what());
  }
}

/// Runs one operation, which SONICMOE_LOG=dispatch reports in one line.
template <class Run>
void run_operation(std::string_view operation, const Context& context, Run run) {
  const DispatchLine line(operation);
  answer(operation, context, run);
}

/// The most tokens, and the most pairs: row numbers are int32.
inline constexpr std::int64_t kMostRows = (std::int64_t{1} << 31) - 2;

/// A shape whose bytes can be counted: positive sizes, known enumerators, num_pairs as the form has
/// it, buffers below 2^59 elements. Whatever is computed from such a shape fits 64 bits.
void check_countable(const Check& check, const MoEShape& shape);
/// A case of Numerics that the library knows. A backend may know fewer.
void check_numerics(const Check& check, const Numerics& numerics);
/// One that operations take: countable, tokens and pairs up to kMostRows, widths below 2^31.
void check_shape(const Check& check, const MoEShape& shape);

/// A limit that the plan of a call found room under.
void check_limit(const Check& check, const WorkspacePlan& plan, std::optional<std::size_t> limit);
/// The scratch of a call under its plan.
void check_workspace(const Check& check, const WorkspacePlan& plan, const TensorView& workspace,
                     std::optional<std::size_t> limit);

/// num_tokens, num_experts, top_k of a router.
void check_router_sizes(const Check& check, std::int64_t num_tokens, std::int64_t num_experts,
                        std::int64_t top_k);

/// rounded_capacity() with errors in the name of the caller's operation.
std::int64_t checked_capacity(const Check& check, std::int64_t num_tokens, std::int64_t num_experts,
                              std::int64_t top_k, const RoundingOptions& rounding);

// Each of these checks everything but the workspace, whose size the backend tells.
MoEShape check_moe_forward(const Check& check, const MoEForwardArgs& args);
MoEShape check_moe_backward(const Check& check, const MoEBackwardArgs& args);
void check_step(const Check& check, BackwardStep step);
/// Those that the steps hand on, whose size the backend tells, too.
void check_row_lists(const Check& check, const Backend& backend, const MoEShape& shape,
                     const MoEBackwardArgs& args);
/// `weights` is the argument's name for topk_weights or pair_weights.
void check_route_forward(const Check& check, const RouteForwardArgs& args,
                         const char* weights = "topk_weights");
void check_route_backward(const Check& check, const RouteBackwardArgs& args);
void check_round_tokens_forward(const Check& check, const RoundTokensForwardArgs& args,
                                const char* weights = "pair_weights");
void check_round_tokens_backward(const Check& check, const RoundTokensBackwardArgs& args);

/// The operands of a router's logits; x, which has been checked, is [T, d].
void check_router(const Check& check, const ConstTensorView& x, const ConstTensorView& weight,
                  const ConstTensorView& bias, const ConstTensorView& logits,
                  std::int64_t num_experts);
/// The gradient of a bias that backward does not see: of its weight's dtype or float32.
void check_router_bias_gradient(const Check& check, const ConstTensorView& grad,
                                const ConstTensorView& weight, bool accumulate);

/// Options alone, for a router over `num_experts`.
void check_router_options(const Check& check, const RouterOptions& options,
                          std::int64_t num_experts);
void check_seed(const Check& check, const RoundingOptions& rounding);
void check_expert_options(const Check& check, const ExpertOptions& options);
void check_max_rows(const Check& check, std::optional<std::int64_t> max_rows);

/// A gradient of a parameter, where there is one: its shape, and its dtype or float32 (float32
/// alone with `accumulate`).
void check_parameter_gradient(const Check& check, const char* name, const ConstTensorView& grad,
                              const ConstTensorView& parameter, bool accumulate);

}  // namespace sonicmoe
