// Expert ids of tokens as the caller stores them, and loops over tokens.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

#include "core/parallel.hpp"
#include "router/scoring.hpp"
#include "sonicmoe/context.hpp"
#include "sonicmoe/tensor.hpp"

namespace sonicmoe {

template <class Id>
struct IdTag {};

/// Calls function(IdTag<std::int32_t>) or function(IdTag<std::int64_t>).
template <class Function>
void visit_id_dtype(DType dtype, Function&& function) {
  if (dtype == DType::kInt64) {
    function(IdTag<std::int64_t>{});
  } else {
    function(IdTag<std::int32_t>{});
  }
}

/// Row `token` of topk_ids [T, K]. False when an id is outside 0..E-1 or occurs twice: the router's
/// own top-K has neither. Reads O(K^2) ids.
bool load_ids(const ConstTensorView& topk_ids, std::int64_t token, std::int64_t num_experts,
              std::int64_t* ids /* [K] */);

/// Throws the Error for a token that load_ids refused.
[[noreturn]] void fail_token_ids(const char* operation, const ConstTensorView& topk_ids,
                                 std::int64_t num_experts, std::int64_t token);

/// Calls task(begin, end) for every block of kTokenBlock tokens, the last one shorter.
inline void parallel_for_tokens(const Context& context, std::int64_t num_tokens,
                                const std::function<void(std::int64_t, std::int64_t)>& task) {
  const std::int64_t blocks = (num_tokens + kTokenBlock - 1) / kTokenBlock;
  parallel_for(thread_count(context.num_threads), blocks, [&](std::int64_t block, int) {
    const std::int64_t begin = block * kTokenBlock;
    task(begin, std::min(begin + kTokenBlock, num_tokens));
  });
}

}  // namespace sonicmoe
