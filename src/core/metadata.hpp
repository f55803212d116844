// Routing metadata on the host: which row belongs to which pair and token.
//
// Rows are the kept pairs sorted by expert, stably: inside an expert they keep input order. Of
// those the first C = shape.row_capacity() have a row; the pairs of the others are dropped, too.
#pragma once

#include <cstdint>

#include "sonicmoe/moe.hpp"

namespace sonicmoe {

/// Views into the metadata buffer. All entries int32.
struct Metadata {
  std::int32_t* offsets = nullptr;    ///< [E] cumulative ends
  std::int32_t* row_token = nullptr;  ///< [C] token of a row; null for sorted rows (row = token)
  std::int32_t* row_pair = nullptr;   ///< [C] input position of a row; null for sorted rows
  std::int32_t* pair_row = nullptr;   ///< [P] row of a pair, -1 when dropped; null for sorted rows
  std::int32_t* token_start = nullptr;  ///< [T+1] pair lists only: rows of token t are
  std::int32_t* token_rows = nullptr;   ///< [P]   token_rows[token_start[t] .. token_start[t+1]),
                                        ///< -1 in place of one beyond C

  std::int64_t num_experts = 0;
  std::int64_t num_rows() const { return num_experts == 0 ? 0 : offsets[num_experts - 1]; }
  std::int64_t first_row(std::int64_t expert) const {
    return expert == 0 ? 0 : offsets[expert - 1];
  }
  std::int64_t token_of(std::int64_t row) const { return row_token ? row_token[row] : row; }
  std::int64_t pair_of(std::int64_t row) const { return row_pair ? row_pair[row] : row; }
};

/// Lays the arrays out in `buffer` (moe_metadata_bytes() long).
Metadata metadata_view(const MoEShape& shape, void* buffer);

/// Fills them from the caller's routing, one pass per array, sequentially: P integer operations.
/// Returns the number of pairs that would have had a row beyond C.
/// Throws Error for sorted offsets that decrease, are negative or exceed P.
std::int64_t build_metadata(const MoEShape& shape, const Routing& routing,
                            const Metadata& metadata);

/// Writes it into rows_dropped [1] int32, where that is present.
void store_rows_dropped(const TensorView& rows_dropped, std::int64_t count);

/// Throws Error unless `metadata` could have come from build_metadata() of this shape: every index
/// in its range, each row listed once. Backward follows them without looking again, and on several
/// threads.
void check_metadata(const MoEShape& shape, const Metadata& metadata);

/// Calls visit(row) for the rows of token t in input order. K is P / T for top-K routing.
template <class Visit>
void for_rows_of_token(const MoEShape& shape, const Metadata& m, std::int64_t t, Visit visit) {
  switch (shape.form) {
    case MoEShape::Form::kSorted:
      if (t < m.num_rows()) visit(t);
      return;
    case MoEShape::Form::kTopK: {
      const std::int64_t k = shape.num_pairs / shape.num_tokens;
      for (std::int64_t p = t * k; p < (t + 1) * k; ++p) {
        if (m.pair_row[p] >= 0) visit(static_cast<std::int64_t>(m.pair_row[p]));
      }
      return;
    }
    case MoEShape::Form::kPairs:
      for (std::int32_t i = m.token_start[t]; i < m.token_start[t + 1]; ++i) {
        if (m.token_rows[i] >= 0) visit(static_cast<std::int64_t>(m.token_rows[i]));
      }
      return;
  }
}

/// The caller's weights of any form; absent for sorted rows without weights.
const ConstTensorView& routing_weights(const Routing& routing);

/// The routing weights of any form as float32 by input position; 1 where none were given.
class RoutingWeights {
 public:
  explicit RoutingWeights(const Routing& routing);
  float operator[](std::int64_t pair) const {
    if (data_ == nullptr) return 1.0f;
    return is_bfloat16_ ? static_cast<float>(static_cast<const bfloat16*>(data_)[pair])
                        : static_cast<const float*>(data_)[pair];
  }

 private:
  const void* data_ = nullptr;
  bool is_bfloat16_ = false;
};

}  // namespace sonicmoe
