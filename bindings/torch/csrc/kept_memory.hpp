// Large CPU tensors whose memory is kept when they are freed.
#pragma once

#include "convert.hpp"

namespace sonicmoe_torch {

/// Uninitialised, on the device of `like`. torch's CPU allocator gives large tensors back to the
/// system, and their successors pay a page fault every 4 KB: for H and the weight gradients a
/// seventh of a training step on two CPU cores. So on the CPU the memory of freed ones is kept, up
/// to kMostKeptResults bytes in all, for later ones of a like size; smaller tensors, other devices
/// and torch 2.10 (whose stable interface has no deleters) get torch's own memory. The storage
/// cannot be resized.
Tensor new_kept(const Tensor& like, std::initializer_list<std::int64_t> shape, ScalarType dtype);
/// Of the shape and dtype of `like`, a weight, and of its order of dimensions, unless that leaves
/// the gradient no unit stride. Always dense.
Tensor new_kept_like(const Tensor& like);

inline constexpr std::size_t kLeastKeptResult = std::size_t{4} << 20;
inline constexpr std::size_t kMostKeptResults = std::size_t{512} << 20;

}  // namespace sonicmoe_torch
