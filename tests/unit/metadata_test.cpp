// Metadata that backward follows: what forward wrote passes, one changed index does not.
#include "core/metadata.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "rig/moe_case.hpp"
#include "sonicmoe/error.hpp"

namespace sonicmoe::rig {
namespace {

struct CheckedCase {
  MoEShape::Form form;
  std::optional<std::int64_t> max_rows;
};

class MetadataCheck : public ::testing::TestWithParam<CheckedCase> {
 protected:
  MetadataCheck() {
    MoECase c;
    c.form = GetParam().form;
    c.max_rows = GetParam().max_rows;
    c.drop_probability = 0.2;
    const MoEInputs inputs(host_target(), c);
    shape_ = inputs.shape();
    entries_.resize(moe_metadata_bytes(shape_) / sizeof(std::int32_t));
    view_ = metadata_view(shape_, entries_.data());
    build_metadata(shape_, inputs.routing(), view_);
  }

  bool accepted() const {
    try {
      check_metadata(shape_, view_);
    } catch (const Error& error) {
      EXPECT_EQ(error.argument(), "metadata");
      return false;
    }
    return true;
  }
  // Values an index might have by accident.
  std::vector<std::int32_t> wrong_values(std::int32_t valid) const {
    const auto pairs = static_cast<std::int32_t>(shape_.num_pairs);
    return {valid - 1, valid + 1, -2, pairs, pairs + 1, 0x7fffffff, -0x7fffffff - 1};
  }

  MoEShape shape_;
  std::vector<std::int32_t> entries_;
  Metadata view_;
};

std::string case_name(const ::testing::TestParamInfo<CheckedCase>& test) {
  constexpr const char* kNames[] = {"topk", "sorted", "pairs"};
  return std::string(kNames[static_cast<int>(test.param.form)]) +
         (test.param.max_rows ? "_max_rows" : "");
}

INSTANTIATE_TEST_SUITE_P(Forms, MetadataCheck,
                         ::testing::Values(CheckedCase{MoEShape::Form::kTopK, {}},
                                           CheckedCase{MoEShape::Form::kSorted, {}},
                                           CheckedCase{MoEShape::Form::kPairs, {}},
                                           CheckedCase{MoEShape::Form::kTopK, 15},
                                           CheckedCase{MoEShape::Form::kPairs, 15}),
                         case_name);

TEST_P(MetadataCheck, WhatForwardWrotePasses) {
  EXPECT_GT(view_.num_rows(), 10);
  EXPECT_TRUE(accepted());
}

TEST_P(MetadataCheck, OneWrongIndexDoesNot) {
  const std::int64_t rows = view_.num_rows();
  const auto attack = [&](std::int32_t* array, std::int64_t count, const char* name) {
    for (std::int64_t i = 0; array != nullptr && i < count; ++i) {
      const std::int32_t valid = array[i];
      for (const std::int32_t wrong : wrong_values(valid)) {
        if (wrong == valid) continue;
        array[i] = wrong;
        EXPECT_FALSE(accepted()) << name << '[' << i << "] = " << wrong << ", was " << valid;
      }
      array[i] = valid;
    }
  };
  attack(view_.row_token, rows, "row_token");
  attack(view_.row_pair, rows, "row_pair");
  attack(view_.pair_row, shape_.num_pairs, "pair_row");
  if (view_.token_start != nullptr) {
    // A pair without a row does not tell which token it is of.
    if (!shape_.max_rows) attack(view_.token_start, shape_.num_tokens + 1, "token_start");
    attack(view_.token_rows, view_.token_start[shape_.num_tokens], "token_rows");
  }
  EXPECT_TRUE(accepted());
}

// Where an expert ends is the only thing that can be told otherwise and still make sense.
TEST_P(MetadataCheck, EndsOfExpertsAscendToTheNumberOfRows) {
  const std::int64_t last = shape_.num_experts - 1;
  for (std::int64_t e = 0; e <= last; ++e) {
    const std::int32_t valid = view_.offsets[e];
    for (const std::int32_t wrong : wrong_values(valid)) {
      view_.offsets[e] = wrong;
      const bool in_order =
          wrong >= view_.first_row(e) && wrong <= view_.offsets[std::min(e + 1, last)];
      const bool possible =
          in_order && (e < last || (view_.row_pair == nullptr && wrong <= shape_.num_pairs));
      EXPECT_EQ(accepted(), possible) << "offsets[" << e << "] = " << wrong << ", was " << valid;
    }
    view_.offsets[e] = valid;
  }
}

TEST_P(MetadataCheck, OneByteEverywhere) {
  for (const int byte : {0x00, 0x01, 0x7f, 0x80, 0xff}) {
    std::memset(entries_.data(), byte, entries_.size() * sizeof(std::int32_t));
    // Sorted rows without any row are a call in its own right.
    EXPECT_EQ(accepted(), byte == 0 && GetParam().form == MoEShape::Form::kSorted);
  }
}

}  // namespace
}  // namespace sonicmoe::rig
