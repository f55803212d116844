// Forward: H = X W1^T + b1 and A = act(H) block by block; Y = A W2^T + b2 and O = sum s Y slab by
// slab.
//   task of up     one row block: gather X once, all hidden units
//   task of down   one row block: all columns of the slab
//   task of sum    64 tokens
#include "core/slabs.hpp"
#include "core/workspace.hpp"
#include "cpu/aggregate.hpp"
#include "cpu/experts.hpp"
#include "cpu/hidden_block.hpp"
#include "cpu/panels.hpp"

namespace sonicmoe::cpu {
namespace {

// Scratch of one thread.
template <class Compute>
struct ThreadScratch {
  Compute* rows;    // [kRows, max(d, n)] padded: gathered X or A
  Compute* weight;  // [2 kUnits or kColumns, max(d, n)] padded
  float* panel;     // [kRows, 2 kUnits]
  float* temp;      // [3 kUnits]
};

template <class Storage, class Compute>
struct Buffers {
  RowBlock* blocks;
  void* metadata;  // inference only; otherwise the caller keeps it
  Storage* a;      // [P, n]
  Storage* y;      // [P, slab]
  float* sums;     // [threads, kTokenBlock, slab]
  std::byte* scratch;
  std::size_t scratch_stride;

  ThreadScratch<Compute> thread(const MoEShape& shape, int t) const {
    WorkspaceCarver carver(scratch + static_cast<std::size_t>(t) * scratch_stride);
    return carve_thread(shape, carver);
  }

  static ThreadScratch<Compute> carve_thread(const MoEShape& shape, WorkspaceCarver& carver) {
    static_assert(Tile<Compute>::kColumns <= 2 * Tile<Compute>::kUnits);
    const std::int64_t depth = std::max(shape.hidden_size, shape.intermediate_size);
    ThreadScratch<Compute> s;
    s.rows = carver.take<Compute>(panel_size(Tile<Compute>::kRows, depth));
    s.weight = carver.take<Compute>(panel_size(2 * Tile<Compute>::kUnits, depth));
    s.panel = carver.take<float>(Tile<Compute>::kRows * 2 * Tile<Compute>::kUnits);
    s.temp = carver.take<float>(3 * Tile<Compute>::kUnits);
    return s;
  }
};

template <class Storage, class Compute>
Buffers<Storage, Compute> carve(WorkspaceCarver& carver, int threads, const MoEShape& shape,
                                bool inference, std::int64_t slab) {
  Buffers<Storage, Compute> b;
  const auto rows = static_cast<std::size_t>(shape.row_capacity());
  b.blocks = carver.take<RowBlock>(
      static_cast<std::size_t>(max_row_blocks<Compute>(shape.row_capacity(), shape.num_experts)));
  b.metadata = inference ? carver.take_bytes(moe_metadata_bytes(shape)) : nullptr;
  b.a = carver.take<Storage>(rows * static_cast<std::size_t>(shape.intermediate_size));
  b.y = carver.take<Storage>(rows * static_cast<std::size_t>(slab));
  b.sums = carver.take<float>(static_cast<std::size_t>(threads) * kTokenBlock *
                              static_cast<std::size_t>(slab));
  WorkspaceCarver one;
  Buffers<Storage, Compute>::carve_thread(shape, one);
  b.scratch_stride = one.used();
  b.scratch = static_cast<std::byte*>(
      carver.take_bytes(static_cast<std::size_t>(threads) * b.scratch_stride));
  return b;
}

template <class Storage, class Compute>
class Forward {
 public:
  Forward(int threads, const ExpertPlan& plan, const MoEForwardArgs& args)
      : threads_(threads),
        shape_(plan.shape),
        args_(args),
        slab_(plan.workspace.slab_columns),
        layout_(shape_, args.options.gate_up_layout),
        weights_(args.routing) {
    WorkspaceCarver carver(args.workspace.data());
    buffers_ = carve<Storage, Compute>(carver, threads, shape_, !args.h.defined(), slab_);
    metadata_ = metadata_view(shape_, args.h.defined() ? args.metadata.data() : buffers_.metadata);
  }

  void run() {
    store_rows_dropped(args_.rows_dropped, build_metadata(shape_, args_.routing, metadata_));
    const std::int64_t blocks = make_row_blocks<Compute>(metadata_, buffers_.blocks);
    parallel_for(threads_, blocks, [&](std::int64_t i, int t) { up(buffers_.blocks[i], t); });
    for (std::int64_t c = 0; c < shape_.hidden_size; c += slab_) {
      const std::int64_t columns = std::min(slab_, shape_.hidden_size - c);
      parallel_for(threads_, blocks,
                   [&](std::int64_t i, int t) { down(buffers_.blocks[i], c, columns, t); });
      sum(c, columns);
    }
  }

 private:
  // H and A of one row block.
  void up(const RowBlock& block, int thread) const {
    const ThreadScratch<Compute> scratch = buffers_.thread(shape_, thread);
    const std::int64_t d = shape_.hidden_size;
    const Operand<Compute> x = load_rows<Storage>(row_source<Storage>(args_.x, metadata_.row_token),
                                                  block.first, block.rows, 0, d, scratch.rows);
    for (std::int64_t unit = 0; unit < shape_.intermediate_size; unit += Tile<Compute>::kUnits) {
      const std::int64_t units = std::min(Tile<Compute>::kUnits, shape_.intermediate_size - unit);
      const std::int64_t width = layout_.gated() ? 2 * units : units;
      layout_.for_runs(unit, units, [&](std::int64_t column, std::int64_t at, std::int64_t count) {
        const Operand<Compute> w = load_weight<Storage>(args_.weights.w1, block.expert, column,
                                                        count, 0, d, scratch.weight);
        gemm(padded_rows<Compute>(block.rows), count, d, x, w.transposed(), scratch.panel + at,
             width);
      });
      for (std::int64_t r = 0; r < block.rows; ++r) {
        finish_row(block, block.first + r, unit, units, scratch.panel + r * width, scratch.temp);
      }
    }
  }

  // Bias, rounding and store of H, then A from the rounded H.
  void finish_row(const RowBlock& block, std::int64_t row, std::int64_t unit, std::int64_t units,
                  float* panel, float* temp) const {
    layout_.for_runs(unit, units, [&](std::int64_t column, std::int64_t at, std::int64_t count) {
      if (args_.weights.b1.defined()) {
        const ConstTensorView& b1 = args_.weights.b1;
        axpy(1.0f, b1.as<Storage>() + block.expert * b1.stride(0) + column, panel + at, count);
      }
      round_to<Storage>(panel + at, count);
      if (args_.h.defined()) {
        convert(panel + at, args_.h.as<Storage>() + row * layout_.columns() + column, count);
      }
    });
    const GateUp h = split(layout_, panel, units, temp);
    float* a = temp + 2 * Tile<Compute>::kUnits;
    activate(shape_.activation, args_.options.limit, h.gate, h.up, a, units);
    convert(a, buffers_.a + row * shape_.intermediate_size + unit, units);
  }

  // Columns [column, column + columns) of Y for one row block.
  void down(const RowBlock& block, std::int64_t column, std::int64_t columns, int thread) const {
    const ThreadScratch<Compute> scratch = buffers_.thread(shape_, thread);
    const std::int64_t n = shape_.intermediate_size;
    const Operand<Compute> a = load_rows<Storage>(RowSource<Storage>{buffers_.a, n}, block.first,
                                                  block.rows, 0, n, scratch.rows);
    const ConstTensorView& b2 = args_.weights.b2;
    for (std::int64_t c = 0; c < columns; c += Tile<Compute>::kColumns) {
      const std::int64_t count = std::min(Tile<Compute>::kColumns, columns - c);
      const Operand<Compute> w = load_weight<Storage>(args_.weights.w2, block.expert, column + c,
                                                      count, 0, n, scratch.weight);
      Storage* const y = buffers_.y + block.first * slab_ + c;
      float* const in_place = product_in_place(y, slab_);
      float* const product = in_place == nullptr ? scratch.panel : in_place;
      const std::int64_t ld = in_place == nullptr ? count : slab_;
      gemm(padded_rows<Compute>(block.rows), count, n, a, w.transposed(), product, ld);
      for (std::int64_t r = 0; r < block.rows; ++r) {
        if (b2.defined()) {
          axpy(1.0f, b2.as<Storage>() + block.expert * b2.stride(0) + column + c, product + r * ld,
               count);
        }
        convert(product + r * ld, y + r * slab_, count);
      }
    }
  }

  void sum(std::int64_t column, std::int64_t columns) const {
    aggregate(
        threads_, shape_, metadata_, buffers_.y, slab_, args_.out, column, columns,
        [&](std::int64_t row) { return weights_[metadata_.pair_of(row)]; },
        [&](std::int64_t, std::int64_t tokens, float* sums, int) {
          std::fill_n(sums, tokens * columns, 0.0f);
        },
        buffers_.sums);
  }

  int threads_;
  const MoEShape& shape_;
  const MoEForwardArgs& args_;
  std::int64_t slab_;
  HiddenLayout layout_;
  RoutingWeights weights_;
  Buffers<Storage, Compute> buffers_;
  Metadata metadata_;
};

}  // namespace

ExpertPlan plan_forward(int threads, const MoEShape& shape, bool inference,
                        std::optional<std::size_t> limit) {
  ExpertPlan plan;
  visit_types(shape.numerics.storage, [&]<class Storage, class Compute>(Storage, Compute) {
    plan = plan_slabs(shape, Tile<Compute>::kColumns, limit, [&](std::int64_t slab) {
      WorkspaceCarver carver;
      carve<Storage, Compute>(carver, threads, shape, inference, slab);
      return carver.used();
    });
  });
  return plan;
}

void forward(int threads, const ExpertPlan& plan, const MoEForwardArgs& args) {
  visit_types(plan.shape.numerics.storage, [&]<class Storage, class Compute>(Storage, Compute) {
    Forward<Storage, Compute>(threads, plan, args).run();
  });
}

}  // namespace sonicmoe::cpu
