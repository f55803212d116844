// Forward and backward of the expert layer on CUDA: which kernels run, on which buffers.
#pragma once

#include <optional>

#include "core/check.hpp"
#include "core/plan.hpp"
#include "cuda/experts/buffers.hpp"

namespace sonicmoe::cuda {

ExpertPlan plan_forward(const MoEShape& shape, bool inference, std::optional<std::size_t> limit);
ExpertPlan plan_backward(const Products& products, const MoEShape& shape,
                         std::optional<std::size_t> limit, BackwardStep step);
std::size_t row_lists_bytes(const MoEShape& shape);

/// Throws for what the products decline (numerics, widths, strides, alignment), by argument.
void check_forward(const Check& check, const MoEShape& shape, const MoEForwardArgs& args);
void check_backward(const Check& check, const MoEShape& shape, const MoEBackwardArgs& args);

void forward(const Context& context, const ExpertPlan& plan, const MoEForwardArgs& args);
void backward(const Context& context, const ExpertPlan& plan, const MoEBackwardArgs& args);

/// The products of backward, to be called in this order; a layer puts its router's between them.
/// Each enqueues its kernels, for the gradients that are wanted, where it is of args.step.
class BackwardSteps {
 public:
  BackwardSteps(const Context& context, const ExpertPlan& plan, const MoEBackwardArgs& args);

  /// kHidden: row lists; dH, A' and dS from dO, W2 and the stored H.
  void hidden();
  /// kDown: db2; dW2 from A', whose place dX~ then takes.
  void down();
  /// kInput, in slabs.
  /// dX = the sum of dX~ = dH W1 over each token's rows, added at once or slab by slab, in columns
  /// [first, first + columns). With `add`, dX holds what the sum is added to.
  void grad_x(std::int64_t first, std::int64_t columns, bool add);
  /// kUp: db1 and dW1 from dH.
  void up();

  const Metadata& metadata() const { return metadata_; }
  std::int64_t slab_columns() const { return slab_; }
  /// Those columns of dX.
  Matrix grad_x_columns(std::int64_t first) const;

 private:
  struct Buffers {
    RowTables tables;
    void* grad_h;    // [C, g*n]
    void* scaled_a;  // [C, n], needed until dW2 is done
    float* partial;  // [C, ceil(n / 128)]
    void* dx_rows;   // [C, slab] dX~, in kAll in the place of A', where stores_rows()
    void* sorted;    // [sorted_capacity(), d] dO for dW2, then X for dW1, or null: gathered
  };
  // What the workspace of a step holds, with or without a copy of sorted rows.
  static Buffers carve(WorkspaceCarver& carver, const MoEShape& shape, std::int64_t slab,
                       BackwardStep step, bool sorts_rows);
  friend ExpertPlan plan_backward(const Products& products, const MoEShape& shape,
                                  std::optional<std::size_t> limit, BackwardStep step);
  // The rows of a weight gradient of `columns` columns in order, copied now; null: gathered.
  const void* sorted(const ConstTensorView& gathered, std::int64_t columns) const;

  const MoEShape& shape_;
  const MoEBackwardArgs& args_;
  std::int64_t slab_;
  Buffers buffers_;
  Metadata metadata_;
  ProductCall call_;
};

/// Calls step(first column, columns) for each slab of d.
template <class Step>
void for_each_slab(const ExpertPlan& plan, Step step) {
  const std::int64_t d = plan.shape.hidden_size, slab = plan.workspace.slab_columns;
  for (std::int64_t first = 0; first < d; first += slab) step(first, std::min(slab, d - first));
}

}  // namespace sonicmoe::cuda
