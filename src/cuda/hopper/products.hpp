// The family of kernels for Hopper (sm_90a): bf16 on wgmma and TMA.
#pragma once

#include "cuda/products.hpp"

namespace sonicmoe::cuda::hopper {

/// reason_against() is in reasons.cpp, each run() in a .cu of its own.
class HopperProducts final : public Products {
 public:
  std::string_view name() const override { return "hopper"; }
  bool serves(int major, int minor) const override { return major == 9 && minor == 0; }

  Reason reason_against(const ProductCall& call, const UpArgs& args) const override;
  Reason reason_against(const ProductCall& call, const GradHArgs& args) const override;
  Reason reason_against(const ProductCall& call, const RowsArgs& args) const override;
  Reason reason_against(const ProductCall& call, const WeightGradientArgs& args) const override;
  Reason reason_against(const ProductCall& call, const LogitsArgs& args) const override;

  void run(const ProductCall& call, const UpArgs& args) const override;
  void run(const ProductCall& call, const GradHArgs& args) const override;
  void run(const ProductCall& call, const RowsArgs& args) const override;
  void run(const ProductCall& call, const WeightGradientArgs& args) const override;
  void run(const ProductCall& call, const LogitsArgs& args) const override;

  int partial_columns(std::int64_t n) const override;
  bool sorts_rows(std::int64_t num_rows, std::int64_t num_groups, std::int64_t width,
                  std::int64_t columns) const override;
  std::int64_t row_slices(std::int64_t num_rows, std::int64_t width,
                          std::int64_t columns) const override;
};

const Products& products();

}  // namespace sonicmoe::cuda::hopper
