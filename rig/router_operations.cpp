// The router's operations and the losses.
#include "rig/workbench.hpp"
#include "sonicmoe/sonicmoe.hpp"

namespace sonicmoe::rig {
namespace {

TensorView logits_of(Workbench& bench) {
  return bench.floats(DType::kFloat32, {bench.T, bench.E}, 1.5);
}

TensorView rows_of(Workbench& bench) {
  std::vector<std::int64_t> rows;
  for (std::int64_t e = 0; e < bench.E; ++e) rows.push_back(bench.random.integer(0, bench.T));
  rows[0] = bench.T + 1;  // equal counts would have no gradient
  return bench.ids(DType::kInt32, {bench.E}, rows);
}

// ------------------------------------------------------------------------------------------ logits

Call make_router_logits_forward(const Target& target, std::uint64_t seed, Optionals optionals) {
  Workbench bench(target, seed, optionals);
  const DType dtype = bench.random.chance(0.5) ? DType::kFloat32 : bench.dtype;
  RouterLogitsForwardArgs args;
  args.x = bench.floats(bench.dtype, {bench.T, bench.d}, 1.0);
  args.router_weight = bench.floats(dtype, {bench.E, bench.d}, 0.4);
  if (bench.present()) args.router_bias = bench.floats(dtype, {bench.E}, 0.5);
  args.logits = bench.blank(DType::kFloat32, {bench.T, bench.E});
  args.workspace = bench.bytes(
      router_logits_forward_workspace_bytes(bench.context(), bench.T, bench.E, bench.d));
  CallMaker<RouterLogitsForwardArgs> maker;
  Call call = maker.make("router_logits_forward", target, args, router_logits_forward, bench.memory,
                         bench.num_threads);
  call.set_optional("router_bias", 0.0);
  return call;
}

Call make_router_logits_backward(const Target& target, std::uint64_t seed, Optionals optionals) {
  Workbench bench(target, seed, optionals);
  const DType dtype = bench.random.chance(0.5) ? DType::kFloat32 : bench.dtype;
  RouterLogitsBackwardArgs args;
  args.x = bench.floats(bench.dtype, {bench.T, bench.d}, 1.0);
  args.router_weight = bench.floats(dtype, {bench.E, bench.d}, 0.4);
  args.grad_logits = bench.floats(DType::kFloat32, {bench.T, bench.E}, 1.0);
  if (bench.present()) args.grad_x = bench.blank(bench.dtype, {bench.T, bench.d});
  args.grad_router_weight = bench.blank(dtype, {bench.E, bench.d});
  if (bench.present()) args.grad_router_bias = bench.blank(dtype, {bench.E});
  args.workspace = bench.bytes(
      router_logits_backward_workspace_bytes(bench.context(), bench.T, bench.E, bench.d));
  CallMaker<RouterLogitsBackwardArgs> maker;
  Call call = maker.make("router_logits_backward", target, args, router_logits_backward,
                         bench.memory, bench.num_threads);
  for (const char* name : {"grad_x", "grad_router_weight", "grad_router_bias"}) {
    call.set_optional(name);
  }
  return call;
}

// ----------------------------------------------------------------------------------- top-K routing

RouteForwardArgs route_args(Workbench& bench) {
  RouteForwardArgs args;
  args.options = router_options(bench);
  args.logits = logits_of(bench);
  args.topk_ids = bench.blank(bench.id_dtype(), {bench.T, bench.K});
  args.topk_weights = bench.blank(DType::kFloat32, {bench.T, bench.K});
  if (bench.present()) args.rows_per_expert = bench.blank(DType::kInt32, {bench.E});
  return args;
}

Call make_route_forward(const Target& target, std::uint64_t seed, Optionals optionals) {
  Workbench bench(target, seed, optionals);
  const RouteForwardArgs args = route_args(bench);
  CallMaker<RouteForwardArgs> maker;
  spoil_router_options(maker, bench.E, [](RouteForwardArgs& a) -> auto& { return a.options; });
  Call call =
      maker.make("route_forward", target, args, route_forward, bench.memory, bench.num_threads);
  call.set_optional("selection_bias", 0.0);
  call.set_optional("rows_per_expert");
  return call;
}

Call make_route_backward(const Target& target, std::uint64_t seed, Optionals optionals) {
  Workbench bench(target, seed, optionals);
  const RouteForwardArgs forward = route_args(bench);
  route_forward(bench.context(), forward);
  bench.remember();
  RouteBackwardArgs args;
  args.options = forward.options;
  args.logits = forward.logits;
  args.topk_ids = forward.topk_ids;
  args.grad_topk_weights = bench.floats(DType::kFloat32, {bench.T, bench.K}, 1.0);
  args.grad_logits = bench.blank(DType::kFloat32, {bench.T, bench.E});
  CallMaker<RouteBackwardArgs> maker;
  spoil_router_options(maker, bench.E, [](RouteBackwardArgs& a) -> auto& { return a.options; });
  Call call =
      maker.make("route_backward", target, args, route_backward, bench.memory, bench.num_threads);
  call.set_optional("selection_bias", 0.0);
  return call;
}

// ---------------------------------------------------------------------------------- token rounding

RoundTokensForwardArgs round_args(Workbench& bench) {
  RoundTokensForwardArgs args;
  args.options = router_options(bench);
  args.rounding = rounding_options(bench);
  args.logits = logits_of(bench);
  const std::int64_t P = rounded_capacity(bench.T, bench.E, bench.K, args.rounding);
  args.token_ids = bench.blank(DType::kInt32, {P});
  args.expert_ids = bench.blank(DType::kInt32, {P});
  args.pair_weights = bench.blank(DType::kFloat32, {P});
  args.topk_ids = bench.blank(DType::kInt32, {bench.T, bench.K});
  if (bench.present()) args.rows_per_expert = bench.blank(DType::kInt32, {bench.E});
  if (bench.present()) args.rows_per_expert_before = bench.blank(DType::kInt32, {bench.E});
  args.workspace =
      bench.bytes(round_tokens_workspace_bytes(bench.context(), bench.T, bench.E, bench.K));
  return args;
}

void set_optional(Call& call) {
  for (const char* name :
       {"selection_bias", "seed_tensor", "rows_per_expert", "rows_per_expert_before"}) {
    call.set_optional(name, 0.0);
  }
}

Call make_round_tokens_forward(const Target& target, std::uint64_t seed, Optionals optionals) {
  Workbench bench(target, seed, optionals);
  const RoundTokensForwardArgs args = round_args(bench);
  CallMaker<RoundTokensForwardArgs> maker;
  spoil_router_options(maker, bench.E,
                       [](RoundTokensForwardArgs& a) -> auto& { return a.options; });
  spoil_rounding_options(maker, bench.T,
                         [](RoundTokensForwardArgs& a) -> auto& { return a.rounding; });
  Call call = maker.make("round_tokens_forward", target, args, round_tokens_forward, bench.memory,
                         bench.num_threads);
  set_optional(call);
  return call;
}

Call make_round_tokens_backward(const Target& target, std::uint64_t seed, Optionals optionals) {
  Workbench bench(target, seed, optionals);
  const RoundTokensForwardArgs forward = round_args(bench);
  round_tokens_forward(bench.context(), forward);
  bench.remember();
  RoundTokensBackwardArgs args;
  args.options = forward.options;
  args.logits = forward.logits;
  args.topk_ids = forward.topk_ids;
  args.token_ids = forward.token_ids;
  args.expert_ids = forward.expert_ids;
  args.grad_pair_weights = bench.floats(DType::kFloat32, {forward.token_ids.size(0)}, 1.0);
  args.grad_logits = bench.blank(DType::kFloat32, {bench.T, bench.E});
  CallMaker<RoundTokensBackwardArgs> maker;
  spoil_router_options(maker, bench.E,
                       [](RoundTokensBackwardArgs& a) -> auto& { return a.options; });
  Call call = maker.make("round_tokens_backward", target, args, round_tokens_backward, bench.memory,
                         bench.num_threads);
  set_optional(call);
  return call;
}

Call make_round_select(const Target& target, std::uint64_t seed, Optionals optionals) {
  Workbench bench(target, seed, optionals);
  RoundSelectArgs args;
  args.rounding = rounding_options(bench);
  args.scores = logits_of(bench);
  args.topk_ids = bench.ids(DType::kInt32, {bench.T, bench.K}, bench.topk_ids(0.0));
  const std::int64_t P = rounded_capacity(bench.T, bench.E, bench.K, args.rounding);
  args.token_ids = bench.blank(DType::kInt32, {P});
  args.expert_ids = bench.blank(DType::kInt32, {P});
  if (bench.present()) args.rows_per_expert = bench.blank(DType::kInt32, {bench.E});
  if (bench.present()) args.rows_per_expert_before = bench.blank(DType::kInt32, {bench.E});
  args.workspace =
      bench.bytes(round_tokens_workspace_bytes(bench.context(), bench.T, bench.E, bench.K));
  CallMaker<RoundSelectArgs> maker;
  spoil_rounding_options(maker, bench.T, [](RoundSelectArgs& a) -> auto& { return a.rounding; });
  Call call =
      maker.make("round_select", target, args, round_select, bench.memory, bench.num_threads);
  set_optional(call);
  return call;
}

// ------------------------------------------------------------------------------------------ losses

// Arguments of the operations that take them one by one.
struct BalanceArgs {
  LossArgs tensors;
  Scoring scoring = Scoring::kSoftmaxTopK;
  std::int64_t top_k = 1;
};

template <class Visit>
void for_each_tensor(BalanceArgs& args, Visit visit) {
  sonicmoe::for_each_tensor(args.tensors, visit);
}

struct BiasArgs {
  ExpertBiasArgs tensors;
  float rate = 0.125f;
};

template <class Visit>
void for_each_tensor(BiasArgs& args, Visit visit) {
  sonicmoe::for_each_tensor(args.tensors, visit);
}

enum class Loss : std::uint8_t { kBalancing, kZ };

// Of both losses, forward or backward.
template <Loss loss, bool backward>
Call make_loss(const Target& target, std::uint64_t seed, Optionals optionals) {
  Workbench bench(target, seed, optionals);
  BalanceArgs args;
  args.top_k = bench.K;
  args.scoring = bench.random.pick(all_scorings());
  LossArgs& t = args.tensors;
  t.logits = logits_of(bench);
  if (loss == Loss::kBalancing) t.rows_per_expert = rows_of(bench);
  if (backward) {
    t.grad_loss = bench.floats(DType::kFloat32, {1}, 0.0, 0.75);
    t.grad_logits = bench.blank(DType::kFloat32, {bench.T, bench.E});
  } else {
    t.loss = bench.blank(DType::kFloat32, {1});
  }
  CallMaker<BalanceArgs> maker;
  if (loss == Loss::kBalancing) {
    spoil_enumerator(maker, "scoring", all_scorings(),
                     [](BalanceArgs& a) -> auto& { return a.scoring; });
    spoil_count(maker, "top_k", bench.E, [](BalanceArgs& a) -> auto& { return a.top_k; });
  }
  const auto run = [](const Context& c, const BalanceArgs& a) {
    const LossArgs& v = a.tensors;
    if constexpr (loss == Loss::kBalancing && backward) {
      load_balancing_loss_backward(c, a.scoring, a.top_k, v.logits, v.rows_per_expert, v.grad_loss,
                                   v.grad_logits);
    } else if constexpr (loss == Loss::kBalancing) {
      load_balancing_loss_forward(c, a.scoring, a.top_k, v.logits, v.rows_per_expert, v.loss);
    } else if constexpr (backward) {
      router_z_loss_backward(c, v.logits, v.grad_loss, v.grad_logits);
    } else {
      router_z_loss_forward(c, v.logits, v.loss);
    }
  };
  const std::string name = loss == Loss::kBalancing ? "load_balancing_loss" : "router_z_loss";
  return maker.make(name + (backward ? "_backward" : "_forward"), target, args, run, bench.memory,
                    bench.num_threads);
}

Call make_update_expert_bias(const Target& target, std::uint64_t seed, Optionals optionals) {
  Workbench bench(target, seed, optionals);
  BiasArgs args;
  args.tensors.selection_bias = bench.floats(DType::kFloat32, {bench.E}, 1.0);
  args.tensors.rows_per_expert = rows_of(bench);
  CallMaker<BiasArgs> maker;
  spoil_factor(maker, "rate", [](BiasArgs& a) -> auto& { return a.rate; });
  return maker.make(
      "update_expert_bias", target, args,
      [](const Context& c, const BiasArgs& a) {
        update_expert_bias(c, a.tensors.selection_bias, a.tensors.rows_per_expert, a.rate);
      },
      bench.memory, bench.num_threads);
}

}  // namespace

const std::vector<Operation>& router_operations() {
  static const std::vector<Operation> list = {
      {"router_logits_forward", make_router_logits_forward},
      {"router_logits_backward", make_router_logits_backward},
      {"route_forward", make_route_forward},
      {"route_backward", make_route_backward},
      {"round_tokens_forward", make_round_tokens_forward},
      {"round_tokens_backward", make_round_tokens_backward},
      {"round_select", make_round_select},
      {"load_balancing_loss_forward", make_loss<Loss::kBalancing, false>},
      {"load_balancing_loss_backward", make_loss<Loss::kBalancing, true>},
      {"router_z_loss_forward", make_loss<Loss::kZ, false>},
      {"router_z_loss_backward", make_loss<Loss::kZ, true>},
      {"update_expert_bias", make_update_expert_bias},
  };
  return list;
}

}  // namespace sonicmoe::rig
