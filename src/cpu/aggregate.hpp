// The sum over tokens: out[t] = sum over the rows r of t, in input order, of scale(r) * rows[r].
#pragma once

#include <algorithm>

#include "core/metadata.hpp"
#include "core/parallel.hpp"
#include "cpu/vec.hpp"
#include "sonicmoe/moe.hpp"

namespace sonicmoe::cpu {

/// Tokens of one task.
inline constexpr std::int64_t kTokenBlock = 64;

/// Writes out[t, column .. column + columns) for every token. `rows` [R, ld] holds the slab's
/// columns from 0. scale(row) is the float32 factor of a row. begin(first, tokens, sums, thread)
/// initialises the float32 sums [tokens, columns] of a block. `sums` holds threads * kTokenBlock *
/// columns floats.
template <class Storage, class Scale, class Begin>
void aggregate(int threads, const MoEShape& shape, const Metadata& m, const Storage* rows,
               std::int64_t ld, const TensorView& out, std::int64_t column, std::int64_t columns,
               Scale scale, Begin begin, float* sums) {
  const std::int64_t blocks = (shape.num_tokens + kTokenBlock - 1) / kTokenBlock;
  parallel_for(threads, blocks, [&](std::int64_t block, int thread) {
    const std::int64_t first = block * kTokenBlock;
    const std::int64_t tokens = std::min(kTokenBlock, shape.num_tokens - first);
    float* block_sums = sums + thread * kTokenBlock * columns;
    begin(first, tokens, block_sums, thread);
    for (std::int64_t i = 0; i < tokens; ++i) {
      float* sum = block_sums + i * columns;
      for_rows_of_token(shape, m, first + i,
                        [&](std::int64_t r) { axpy(scale(r), rows + r * ld, sum, columns); });
      convert(sum, out.as<Storage>() + (first + i) * out.stride(0) + column, columns);
    }
  });
}

}  // namespace sonicmoe::cpu
