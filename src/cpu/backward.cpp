// Backward without Y: dS = <dA', A>, so that only X, H and the routing metadata are kept.
//   hidden  dH, A', dS  per row block: dA' = dO W2, then the three from the stored H
//   down    dW2, db2    from A', whose place dX~ then takes
//   input   dX          dX~ = dH W1 slab by slab, summed over the rows of each token
//   up      dW1, db1    from dH
#include "core/slabs.hpp"
#include "core/workspace.hpp"
#include "cpu/aggregate.hpp"
#include "cpu/experts.hpp"
#include "cpu/hidden_block.hpp"
#include "cpu/panels.hpp"
#include "cpu/weight_gradient.hpp"

namespace sonicmoe::cpu {
namespace {

// Scratch of one thread while it computes dH or dX~.
template <class Compute>
struct RowScratch {
  Compute* rows;    // [kRows, max(d, g*n)] padded: gathered dO, or dH
  Compute* weight;  // [max(d, g*n), kUnits or kColumns] padded
  float* panel;     // [kRows, kUnits or kColumns]
  float* temp;      // [7 kUnits]
  float* row_sums;  // [kRows] dS

  static RowScratch carve(const MoEShape& shape, WorkspaceCarver& carver) {
    const std::int64_t depth = std::max(shape.hidden_size, shape.h_columns());
    constexpr std::int64_t kWidth = std::max(Tile<Compute>::kUnits, Tile<Compute>::kColumns);
    RowScratch s;
    s.rows = carver.take<Compute>(panel_size(Tile<Compute>::kRows, depth));
    s.weight = carver.take<Compute>(panel_size(kWidth, depth));
    s.panel = carver.take<float>(static_cast<std::size_t>(Tile<Compute>::kRows * kWidth));
    s.temp = carver.take<float>(7 * Tile<Compute>::kUnits);
    s.row_sums = carver.take<float>(Tile<Compute>::kRows);
    return s;
  }
};

// Columns of Wr that one GEMM reads.
constexpr std::int64_t kRouterColumns = Tile<float>::kColumns;

// Scratch of one thread while it sums: a column block of Wr (moe_layer), or column sums.
struct SumScratch {
  float* router_weight;  // [E, kRouterColumns]
  float* columns;        // [max(d, g*n)]

  static SumScratch carve(const MoEShape& shape, WorkspaceCarver& carver) {
    SumScratch s;
    s.router_weight = carver.take<float>(panel_size(shape.num_experts, kRouterColumns));
    s.columns = carver.take<float>(
        static_cast<std::size_t>(std::max(shape.hidden_size, shape.h_columns())));
    return s;
  }
};

template <class Compute>
std::size_t thread_scratch_bytes(const MoEShape& shape) {
  WorkspaceCarver rows, sums, weights;
  RowScratch<Compute>::carve(shape, rows);
  SumScratch::carve(shape, sums);
  WeightGradientScratch<Compute>::carve(weights);
  return std::max({rows.used(), sums.used(), weights.used()});
}

template <class Storage, class Compute>
struct Buffers {
  RowBlock* blocks;
  Storage* dh;  // [P, g*n]
  Storage* a;   // [P, n]  A' = s A, needed until dW2 is done
  Storage* dx;  // [P, slab]  dX~, in the place of A'
  float* sums;  // [threads, kTokenBlock, slab]
  std::byte* scratch;
  std::size_t scratch_stride;

  WorkspaceCarver thread(int t) const {
    return WorkspaceCarver(scratch + static_cast<std::size_t>(t) * scratch_stride);
  }
};

// What the workspace of a step holds; in steps dH and A' are the caller's.
template <class Storage, class Compute>
Buffers<Storage, Compute> carve(WorkspaceCarver& carver, int threads, const MoEShape& shape,
                                std::int64_t slab, BackwardStep step) {
  Buffers<Storage, Compute> b{};
  const bool all = step == BackwardStep::kAll, input = does(step, BackwardStep::kInput);
  const auto rows = static_cast<std::size_t>(shape.row_capacity());
  if (input || does(step, BackwardStep::kHidden)) {
    b.blocks = carver.take<RowBlock>(
        static_cast<std::size_t>(max_row_blocks<Compute>(shape.row_capacity(), shape.num_experts)));
  }
  if (all) b.dh = carver.take<Storage>(rows * static_cast<std::size_t>(shape.h_columns()));
  if (input) {
    const std::int64_t columns = all ? std::max(shape.intermediate_size, slab) : slab;
    b.a = b.dx = carver.take<Storage>(rows * static_cast<std::size_t>(columns));
    b.sums = carver.take<float>(static_cast<std::size_t>(threads) * kTokenBlock *
                                static_cast<std::size_t>(slab));
  }
  b.scratch_stride = thread_scratch_bytes<Compute>(shape);
  b.scratch = static_cast<std::byte*>(
      carver.take_bytes(static_cast<std::size_t>(threads) * b.scratch_stride));
  return b;
}

template <class Storage, class Compute>
class Backward {
 public:
  Backward(int threads, const ExpertPlan& plan, const MoEBackwardArgs& args)
      : threads_(threads),
        shape_(plan.shape),
        args_(args),
        slab_(plan.workspace.slab_columns),
        layout_(shape_, args.options.gate_up_layout),
        weights_(args.routing),
        // The metadata is only read here; the view type is shared with the forward that fills it.
        metadata_(metadata_view(shape_, const_cast<void*>(args.metadata.data()))),
        grad_out_(row_source<Storage>(args.grad_out, metadata_.row_token)),
        x_(row_source<Storage>(args.x, metadata_.row_token)) {
    WorkspaceCarver carver(args.workspace.data());
    buffers_ = carve<Storage, Compute>(carver, threads, shape_, slab_, args.step);
    if (args.step == BackwardStep::kAll) return;
    buffers_.dh = args.grad_h.as<Storage>();
    buffers_.a = args.scaled_a.as<Storage>();
  }

  void run(BackwardStep step, const RouterGradX* router) {
    using enum BackwardStep;
    if (args_.step != kAll || step == kHidden) check_metadata(shape_, metadata_);
    if (step == kHidden) return hidden();
    if (step == kDown) return down();
    if (step == kInput) return input(router);
    up();
  }

 private:
  void hidden() {
    const TensorView& ds = args_.grad_routing_weights;
    if (ds.defined()) std::fill_n(ds.as<float>(), ds.numel(), 0.0f);
    const std::int64_t blocks = make_row_blocks<Compute>(metadata_, buffers_.blocks);
    parallel_for(threads_, blocks, [&](std::int64_t i, int t) { grad_h(buffers_.blocks[i], t); });
  }

  void down() const {
    bias(grad_out_, args_.grad_b2, [&](std::int64_t r) { return weights_[metadata_.pair_of(r)]; });
    const RowSource<Storage> a{buffers_.a, shape_.intermediate_size};
    if (args_.grad_w2.defined()) weights(grad_out_, a, args_.grad_w2);
  }

  void input(const RouterGradX* router) {
    if (!args_.grad_x.defined()) return;
    const std::int64_t blocks = make_row_blocks<Compute>(metadata_, buffers_.blocks);
    for (std::int64_t c = 0; c < shape_.hidden_size; c += slab_) {
      const std::int64_t columns = std::min(slab_, shape_.hidden_size - c);
      parallel_for(threads_, blocks,
                   [&](std::int64_t i, int t) { dx_rows(buffers_.blocks[i], c, columns, t); });
      sum(c, columns, router);
    }
  }

  void up() const {
    const RowSource<Storage> dh{buffers_.dh, layout_.columns()};
    bias(dh, args_.grad_b1, [](std::int64_t) { return 1.0f; });
    if (args_.grad_w1.defined()) weights(dh, x_, args_.grad_w1);
  }

  // dS, dH and A' of one row block.
  void grad_h(const RowBlock& block, int thread) const {
    WorkspaceCarver carver = buffers_.thread(thread);
    const auto scratch = RowScratch<Compute>::carve(shape_, carver);
    const std::int64_t d = shape_.hidden_size;
    const Operand<Compute> grad_out =
        load_rows<Storage>(grad_out_, block.first, block.rows, 0, d, scratch.rows);
    std::fill_n(scratch.row_sums, block.rows, 0.0f);
    for (std::int64_t unit = 0; unit < shape_.intermediate_size; unit += Tile<Compute>::kUnits) {
      const std::int64_t units = std::min(Tile<Compute>::kUnits, shape_.intermediate_size - unit);
      const Operand<Compute> w =
          load_weight<Storage>(args_.weights.w2, block.expert, 0, d, unit, units, scratch.weight);
      gemm(padded_rows<Compute>(block.rows), units, d, grad_out, w, scratch.panel, units);
      for (std::int64_t r = 0; r < block.rows; ++r) {
        scratch.row_sums[r] +=
            finish_row(block.first + r, unit, units, scratch.panel + r * units, scratch.temp);
      }
    }
    if (args_.grad_routing_weights.defined()) store_row_sums(block, scratch.row_sums);
  }

  // From dA' of one row (rounded here, as a stored tensor would be): dH and A', rounded once.
  // Returns <dA', A>.
  float finish_row(std::int64_t row, std::int64_t unit, std::int64_t units, float* da,
                   float* temp) const {
    constexpr std::int64_t kUnits = Tile<Compute>::kUnits;
    float* h = temp;                      // [2 units] as the panel orders them
    float* separate = temp + 2 * kUnits;  // [2 units] gate, up of the interleaved layout
    float* gradient = temp + 4 * kUnits;  // [2 units] d gate, d up
    float* a = temp + 6 * kUnits;         // [units]
    const std::int64_t offset = row * layout_.columns();
    layout_.for_runs(unit, units, [&](std::int64_t column, std::int64_t at, std::int64_t count) {
      convert(args_.h.as<Storage>() + offset + column, h + at, count);
    });
    const GateUp gate_up = split(layout_, h, units, separate);
    activate(shape_.activation, args_.options.limit, gate_up.gate, gate_up.up, a, units);
    round_to<Storage>(da, units);
    const float ds = dot(da, a, units);

    const float s = weights_[metadata_.pair_of(row)];
    scale(s, a, units);
    convert(a, buffers_.a + row * shape_.intermediate_size + unit, units);
    scale(s, da, units);
    activate_backward(shape_.activation, args_.options.limit, gate_up.gate, gate_up.up, da,
                      gradient, gradient + units, units);
    if (layout_.interleaved()) {
      interleave(gradient, gradient + units, separate, units);
      gradient = separate;
    }
    layout_.for_runs(unit, units, [&](std::int64_t column, std::int64_t at, std::int64_t count) {
      convert(gradient + at, buffers_.dh + offset + column, count);
    });
    return ds;
  }

  // dS[r] = <dA', A> (+ <dO, b2>) at the pair's place in the input.
  void store_row_sums(const RowBlock& block, const float* row_sums) const {
    const ConstTensorView& b2 = args_.weights.b2;
    auto* ds = args_.grad_routing_weights.as<float>();
    for (std::int64_t r = 0; r < block.rows; ++r) {
      float value = row_sums[r];
      if (b2.defined()) {
        value += dot(grad_out_.row(block.first + r), b2.as<Storage>() + block.expert * b2.stride(0),
                     shape_.hidden_size);
      }
      ds[metadata_.pair_of(block.first + r)] = value;
    }
  }

  // grad[e] = sum of factor(r) rows[r] over the rows of e: db1 from dH, db2 from s and dO.
  template <class Scale>
  void bias(const RowSource<Storage>& rows, const TensorView& grad, Scale factor) const {
    if (!grad.defined()) return;
    parallel_for(threads_, shape_.num_experts, [&](std::int64_t e, int thread) {
      WorkspaceCarver carver = buffers_.thread(thread);
      float* columns = SumScratch::carve(shape_, carver).columns;
      std::fill_n(columns, grad.size(1), 0.0f);
      for (std::int64_t r = metadata_.first_row(e); r < metadata_.offsets[e]; ++r) {
        axpy(factor(r), rows.row(r), columns, grad.size(1));
      }
      put(columns, grad, e * grad.stride(0), grad.size(1), args_.accumulate);
    });
  }

  // Columns [column, column + columns) of dX~ for one row block.
  void dx_rows(const RowBlock& block, std::int64_t column, std::int64_t columns, int thread) const {
    WorkspaceCarver carver = buffers_.thread(thread);
    const auto scratch = RowScratch<Compute>::carve(shape_, carver);
    const std::int64_t depth = layout_.columns();
    const Operand<Compute> dh = load_rows<Storage>(RowSource<Storage>{buffers_.dh, depth},
                                                   block.first, block.rows, 0, depth, scratch.rows);
    for (std::int64_t c = 0; c < columns; c += Tile<Compute>::kColumns) {
      const std::int64_t count = std::min(Tile<Compute>::kColumns, columns - c);
      const Operand<Compute> w = load_weight<Storage>(args_.weights.w1, block.expert, 0, depth,
                                                      column + c, count, scratch.weight);
      Storage* const dx = buffers_.dx + block.first * slab_ + c;
      float* const in_place = product_in_place(dx, slab_);
      float* const product = in_place == nullptr ? scratch.panel : in_place;
      const std::int64_t ld = in_place == nullptr ? count : slab_;
      gemm(padded_rows<Compute>(block.rows), count, depth, dh, w, product, ld);
      for (std::int64_t r = 0; r < block.rows; ++r) {
        convert(product + r * ld, dx + r * slab_, count);
      }
    }
  }

  void sum(std::int64_t column, std::int64_t columns, const RouterGradX* router) const {
    aggregate(
        threads_, shape_, metadata_, buffers_.dx, slab_, args_.grad_x, column, columns,
        [](std::int64_t) { return 1.0f; },
        [&](std::int64_t first, std::int64_t tokens, float* sums, int thread) {
          if (router == nullptr) {
            std::fill_n(sums, tokens * columns, 0.0f);
          } else {
            from_router(*router, first, tokens, column, columns, sums, thread);
          }
        },
        buffers_.sums);
  }

  // sums [tokens, columns] = dLogits[first ..] Wr[:, column ..].
  void from_router(const RouterGradX& router, std::int64_t first, std::int64_t tokens,
                   std::int64_t column, std::int64_t columns, float* sums, int thread) const {
    WorkspaceCarver carver = buffers_.thread(thread);
    float* block = SumScratch::carve(shape_, carver).router_weight;
    const std::int64_t experts = shape_.num_experts;
    const ConstTensorView& wr = router.router_weight;
    const Operand<float> logits{router.grad_logits.as<float>() + first * experts, experts};
    for (std::int64_t c = 0; c < columns; c += kRouterColumns) {
      const std::int64_t count = std::min(kRouterColumns, columns - c);
      const auto load = [&]<class T>(T) {
        return load_rows<T, float>(row_source<T>(wr, nullptr), 0, experts, column + c, count,
                                   block);
      };
      const Operand<float> w = wr.dtype() == DType::kFloat32 ? load(float{}) : load(bfloat16{});
      gemm(tokens, count, experts, logits, w, sums + c, columns);
    }
  }

  void weights(const RowSource<Storage>& left, const RowSource<Storage>& right,
               const TensorView& grad) const {
    weight_gradient<Storage, Compute>(threads_, metadata_, left, right, grad, args_.accumulate,
                                      [&](int thread) {
                                        WorkspaceCarver carver = buffers_.thread(thread);
                                        return WeightGradientScratch<Compute>::carve(carver);
                                      });
  }

  int threads_;
  const MoEShape& shape_;
  const MoEBackwardArgs& args_;
  std::int64_t slab_;
  HiddenLayout layout_;
  RoutingWeights weights_;
  Metadata metadata_;
  RowSource<Storage> grad_out_;
  RowSource<Storage> x_;
  Buffers<Storage, Compute> buffers_;
};

}  // namespace

ExpertPlan plan_backward(int threads, const MoEShape& shape, std::optional<std::size_t> limit,
                         BackwardStep step) {
  ExpertPlan plan;
  visit_types(shape.numerics.storage, [&]<class Storage, class Compute>(Storage, Compute) {
    plan = plan_backward_slabs(shape, Tile<Compute>::kColumns, limit, step,
                               [&](std::int64_t slab, BackwardStep part) {
                                 WorkspaceCarver carver;
                                 carve<Storage, Compute>(carver, threads, shape, slab, part);
                                 return carver.used();
                               });
  });
  return plan;
}

void backward_step(int threads, const ExpertPlan& plan, const MoEBackwardArgs& args,
                   BackwardStep run, const RouterGradX* router) {
  if (!does(args.step, run)) return;
  visit_types(plan.shape.numerics.storage, [&]<class Storage, class Compute>(Storage, Compute) {
    Backward<Storage, Compute>(threads, plan, args).run(run, router);
  });
}

}  // namespace sonicmoe::cpu
