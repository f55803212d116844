// All ranks of an exchange in one process: on a CPU a thread each, on a GPU a stream each, so that
// the very kernels, flags and waits of several GPUs run on one.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/exchange.hpp"
#include "rig/moe_case.hpp"
#include "rig/moe_run.hpp"

namespace sonicmoe::rig {

struct ExchangeCase {
  /// The layer on the tokens of all ranks, one rank's after another's; top-K, max_rows unset.
  MoECase layer;
  std::vector<std::int64_t> tokens;  ///< of every rank; their sum is layer.num_tokens
  std::int64_t max_tokens = 0;       ///< 0: the largest of `tokens`
  std::optional<std::int64_t> max_rows;
  bool keep_received = false;
  double timeout_seconds = 60.0;

  int num_ranks() const { return static_cast<int>(tokens.size()); }
  std::string describe() const;
};

/// Equal numbers of tokens, or nearly.
std::vector<std::int64_t> spread_tokens(std::int64_t num_tokens, int num_ranks);

/// One rank: its tokens, its experts, its outputs, all poison at first.
struct ExchangeRank {
  Tensor x, grad_out, topk_ids, topk_weights;
  Tensor w1, b1, w2, b2;
  Tensor out, h, received, rows_dropped;
  Tensor grad_x, grad_w1, grad_b1, grad_w2, grad_b2, grad_routing_weights;
  GuardedBuffer metadata, forward_workspace, backward_workspace, buffer;
  std::optional<Exchange> exchange;
  void* stream = nullptr;

  ExpertWeights weights() const { return {w1.view(), b1.view(), w2.view(), b2.view()}; }
};

/// On a GPU, a product's CTA takes a whole multiprocessor and one rank's product does not end
/// before its last CTA has run, so that the others' waits must leave it room: while a group lives,
/// products have a CTA fewer for every rank (hopper::tuning). On GPUs of their own ranks wait for
/// nobody that needs their multiprocessors.
class ExchangeGroup {
 public:
  ExchangeGroup(const Target& target, const ExchangeCase& test_case);
  ~ExchangeGroup();
  ExchangeGroup(const ExchangeGroup&) = delete;
  ExchangeGroup& operator=(const ExchangeGroup&) = delete;

  /// call(rank) on every rank, side by side, until all have ended. The errors by rank, "" for none.
  std::vector<std::string> run(const std::function<void(int)>& call);
  /// On every rank; throws the first error.
  void forward();
  void backward();

  // One rank's call, to be made within run().
  void forward(int rank);
  void backward(int rank);
  MoEExchangeForwardArgs forward_args(int rank) const;
  MoEExchangeBackwardArgs backward_args(int rank) const;
  Context context(int rank) const;

  /// The next call of every rank is number `call` + 1.
  void start_at(std::uint32_t call);

  /// What the ranks have, put together: tokens and experts of one rank after another's.
  RunResult result() const;
  /// "rank R: NAME: what happened" for what a call wrote where it must not.
  std::vector<std::string> violations() const;

  ExchangeRank& rank(int r) { return *ranks_[static_cast<std::size_t>(r)]; }
  const ExchangeShape& shape() const { return shape_; }
  const MoEInputs& inputs() const { return inputs_; }
  ExpertOptions options() const;

 private:
  void make_rank(int r, std::int64_t first_token);

  const Target& target_;
  ExchangeCase case_;
  MoEInputs inputs_;  // on the host
  ExchangeShape shape_;
  int grid_before_;
  std::vector<std::unique_ptr<ExchangeRank>> ranks_;
};

/// The definition in exchange.hpp, by moe_forward and moe_backward of one process on the tokens of
/// all ranks: each rank's experts alone, then out and dX summed in rank order in float32.
/// out_bound and grad_x_bound [T, d]: the most that out and dX may differ from one process with all
/// experts by, which rounds once where this rounds each rank's part.
struct Definition {
  RunResult result;
  Values out_bound, grad_x_bound;
};
Definition exchange_definition(const Target& target, const ExchangeCase& test_case);

}  // namespace sonicmoe::rig
