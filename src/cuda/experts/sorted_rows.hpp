// The copy that cuda/sorted_rows.hpp describes.
#pragma once

#include "cuda/products.hpp"
#include "cuda/sorted_rows.hpp"

namespace sonicmoe::cuda {

/// Enqueues the copy of `gathered` [T, width] to `sorted` [sorted_capacity(P, G), width]
/// contiguous. width is a multiple of 8, rows start at 16 bytes.
void sort_rows(const ProductCall& call, const Matrix& gathered, std::int64_t width,
               std::int64_t num_groups, void* sorted);

}  // namespace sonicmoe::cuda
