// Row lists on the device: what core/metadata.hpp builds on the host, without a synchronisation.
#pragma once

#include <cuda_runtime_api.h>

#include "core/metadata.hpp"
#include "core/workspace.hpp"
#include "cuda/products.hpp"

namespace sonicmoe::cuda {

/// Device scratch of build_metadata(). Carved from the workspace.
struct MetadataScratch {
  std::int32_t* expert_counts = nullptr;  ///< [blocks, E], then exclusive sums over the blocks
  std::int32_t* expert_totals = nullptr;  ///< [E]
  std::int32_t* token_counts = nullptr;   ///< [T + 1, whole int4], pair lists only
  std::int32_t* token_pairs = nullptr;    ///< [P], pair lists only
};
MetadataScratch carve_metadata_scratch(WorkspaceCarver& carver, const MoEShape& shape);

/// Tables derived from the offsets, built for each call. Carved from the workspace.
struct RowTables {
  int4* tiles = nullptr;              ///< [tile_capacity()]
  int4* experts = nullptr;            ///< [E]
  std::int32_t* num_tiles = nullptr;  ///< [1]
  std::uint32_t* claims = nullptr;    ///< [RowLists::kCounters] cleared
  float* row_weight = nullptr;        ///< [C]; the caller clears it where there is no use for it
  /// Where lists_tokens(): [T] tokens with rows, then from the end those without, both in any
  /// order; [2] how many.
  std::int32_t* tokens = nullptr;
  std::int32_t* num_tokens = nullptr;
};
/// Whether sums find the tokens with rows in a list: of top-K routing with kMostListedSlots and
/// fewer, where at most half of the pairs have a row.
inline constexpr std::int64_t kMostListedSlots = 16;
inline bool lists_tokens(const MoEShape& shape) {
  return shape.form == MoEShape::Form::kTopK && shape.deterministic && shape.num_pairs > 0 &&
         2 * shape.row_capacity() <= shape.num_pairs &&
         shape.num_pairs <= kMostListedSlots * shape.num_tokens;
}
RowTables carve_row_tables(WorkspaceCarver& carver, const MoEShape& shape);

/// Fills `metadata` (device memory) from the caller's routing: the same entries as the host's
/// build_metadata(), places past the last row -1. Offsets of sorted rows are clamped to
/// non-decreasing ends within 0..P. Deterministic: counts and ranks, also of the pairs that a list
/// gives to one token: they are collected as they come, then ranked. Fills `tables` too,
/// row_weight where it is not null, and rows_dropped [1] where it is not null.
/// Limit: 36 bytes of a CTA's shared memory an expert (6446 experts); more are refused.
void build_metadata(cudaStream_t stream, const MoEShape& shape, const Routing& routing,
                    const Metadata& metadata, const MetadataScratch& scratch,
                    const RowTables& tables, std::int32_t* rows_dropped);

/// Fills `tables` from metadata.offsets and the routing weights: for a backward pass, which has the
/// metadata.
void build_row_tables(cudaStream_t stream, const MoEShape& shape, const Routing& routing,
                      const Metadata& metadata, const RowTables& tables);

/// The view that products take.
RowLists row_lists(const Metadata& metadata, const RowTables& tables);

}  // namespace sonicmoe::cuda
