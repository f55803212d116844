#include "router/token_ids.hpp"

#include <string>

#include "sonicmoe/error.hpp"

namespace sonicmoe {

bool load_ids(const ConstTensorView& topk_ids, std::int64_t token, std::int64_t num_experts,
              std::int64_t* ids) {
  const std::int64_t top_k = topk_ids.size(1);
  visit_id_dtype(topk_ids.dtype(), [&]<class Id>(IdTag<Id>) {
    std::copy_n(topk_ids.as<Id>() + token * top_k, top_k, ids);
  });
  for (std::int64_t k = 0; k < top_k; ++k) {
    if (ids[k] < 0 || ids[k] >= num_experts) return false;
    if (std::find(ids, ids + k, ids[k]) != ids + k) return false;
  }
  return true;
}

void fail_token_ids(const char* operation, const ConstTensorView& topk_ids,
                    std::int64_t num_experts, std::int64_t token) {
  std::string given;
  visit_id_dtype(topk_ids.dtype(), [&]<class Id>(IdTag<Id>) {
    const Id* ids = topk_ids.as<Id>() + token * topk_ids.size(1);
    for (std::int64_t k = 0; k < topk_ids.size(1); ++k) {
      given += (k > 0 ? ", " : "") + std::to_string(ids[k]);
    }
  });
  throw Error(operation, "topk_ids",
              "distinct experts in 0.." + std::to_string(num_experts - 1) + " for every token",
              "[" + given + "] for token " + std::to_string(token));
}

}  // namespace sonicmoe
