#include "cuda/hopper/products.hpp"

#include "cuda/hopper/select.hpp"

namespace sonicmoe::cuda::hopper {

const Products& products() {
  static const HopperProducts family;
  return family;
}

int HopperProducts::partial_columns(std::int64_t n) const { return choose_block_n(n); }

bool HopperProducts::sorts_rows(std::int64_t num_rows, std::int64_t num_groups, std::int64_t width,
                                std::int64_t columns) const {
  return choose_sorted(num_rows, num_groups, width, columns);
}

std::int64_t HopperProducts::row_slices(std::int64_t num_rows, std::int64_t width,
                                        std::int64_t columns) const {
  return choose_slices(num_rows, width, columns);
}

}  // namespace sonicmoe::cuda::hopper
