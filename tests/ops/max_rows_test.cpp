// ExpertOptions::max_rows, first_expert of a routing, tokens without rows: on every backend.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <set>
#include <vector>

#include "core/metadata.hpp"
#include "rig/compare.hpp"
#include "rig/layer_run.hpp"
#include "rig/moe_run.hpp"

namespace sonicmoe::rig {
namespace {

using Form = MoEShape::Form;

std::string join(const std::vector<std::string>& lines) {
  std::string text;
  for (const std::string& line : lines) text += line + "\n";
  return text;
}

// Slots dropped by the caller, duplicates, tokens without rows, foreign experts; on a GPU widths of
// several column blocks.
MoECase case_of(const Target& target, Form form, DType dtype) {
  const bool large = target.device.type == DeviceType::kCuda;
  MoECase c;
  c.form = form;
  c.dtype = dtype;
  c.num_tokens = large ? 573 : 73;
  c.num_pairs = large ? 1211 : 151;
  c.num_experts = 6;
  c.top_k = 3;
  c.hidden_size = large ? 264 : 40;
  c.intermediate_size = 24;
  c.drop_probability = 0.4;
  c.first_expert = 12;
  c.seed = 40 + static_cast<std::uint64_t>(form);
  return fitted(target, c);
}

// R without a bound.
std::int64_t rows_of(const MoECase& c) {
  const MoEInputs inputs(host_target(), c);
  return static_cast<std::int64_t>(
      oracle::sorted_rows(inputs.routing(), c.tokens(), c.num_experts).size());
}

// The case with the pairs that `c.max_rows` leaves out dropped by the caller.
MoECase with_slots_dropped(const MoECase& c) {
  MoECase dropped = c;
  const std::int64_t most = *c.max_rows;
  dropped.max_rows.reset();
  dropped.fill = [most](MoEInputs& inputs) {
    const MoECase& d = inputs.description;
    const MoEInputs host(host_target(), [&] {
      MoECase plain = d;
      plain.fill = nullptr;
      return plain;
    }());
    const auto rows = oracle::sorted_rows(host.routing(), d.tokens(), d.num_experts);
    Tensor& ids = d.form == Form::kTopK ? inputs.topk_ids : inputs.expert_ids;
    const Values before = ids.values();
    std::vector<std::int64_t> after(before.size());
    std::transform(before.begin(), before.end(), after.begin(),
                   [](double id) { return static_cast<std::int64_t>(id); });
    for (std::size_t r = static_cast<std::size_t>(most); r < rows.size(); ++r) {
      after[static_cast<std::size_t>(rows[r].position)] = -1;
    }
    ids.fill_ids(after);
  };
  return dropped;
}

class MaxRows : public ::testing::TestWithParam<Target> {
 protected:
  const Target& target() const { return GetParam(); }
  RunResult run(const MoECase& c, const RunOptions& options = {}) const {
    return run_moe(target(), c, options);
  }
  void expect_equal(const RunResult& a, const RunResult& b) const {
    RunResult other = b;
    other.rows_dropped = a.rows_dropped;  // compared apart
    EXPECT_EQ(bitwise_difference(a, other), "");
  }
};
INSTANTIATE_TEST_SUITE_P(Backends, MaxRows, ::testing::ValuesIn(targets()),
                         [](const auto& test) { return test.param.backend; });

TEST_P(MaxRows, NoneExactOneShortHalfAndMore) {
  for (const Form form : {Form::kTopK, Form::kPairs}) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      MoECase c = case_of(target(), form, dtype);
      const std::int64_t rows = rows_of(c), pairs = c.pairs();
      ASSERT_TRUE(rows > 60 && rows < pairs);
      const RunResult unbounded = run(c);
      for (const std::int64_t most : {std::int64_t{0}, std::int64_t{1}, rows / 2, rows - 1, rows,
                                      rows + 1, pairs, pairs + 5}) {
        c.max_rows = most;
        SCOPED_TRACE(c.describe());
        const RunResult bounded = run(c);
        EXPECT_EQ(bounded.rows_dropped, std::max<std::int64_t>(rows - most, 0));
        EXPECT_EQ(join(check_run(c, {}, bounded, Strictness::kTiny)), "");
        expect_equal(bounded, most >= rows ? unbounded : run(with_slots_dropped(c)));
      }
    }
  }
}

// More tokens than all warps of a GPU visit at once, most of them without rows.
TEST_P(MaxRows, TokensFarDownTheList) {
  if (target().device.type != DeviceType::kCuda) GTEST_SKIP() << "a list of the CUDA backend";
  for (const int top_k : {3, 16}) {
    MoECase c = case_of(target(), Form::kTopK, DType::kBFloat16);
    c.num_tokens = 20011;
    c.top_k = top_k;
    c.hidden_size = 16;
    c.intermediate_size = 8;
    c.drop_probability = 0.9;
    const std::int64_t rows = rows_of(c);
    c.max_rows = rows;
    ASSERT_LE(2 * rows, c.pairs());
    SCOPED_TRACE(c.describe());
    const RunResult bounded = run(c);
    EXPECT_EQ(join(check_run(c, {}, bounded, Strictness::kTiny)), "");
    c.max_rows.reset();
    expect_equal(bounded, run(c));
  }
}

TEST_P(MaxRows, ChangesNoBitUnderALimitInStepsOrInInference) {
  for (const Form form : {Form::kTopK, Form::kPairs}) {
    MoECase c = case_of(target(), form, DType::kBFloat16);
    c.max_rows = rows_of(c) - 20;
    SCOPED_TRACE(c.describe());
    const RunResult whole = run(c);
    RunOptions options;
    options.num_threads = 1;
    options.forward_limit = whole.forward_plan.minimum_bytes;
    options.backward_limit = whole.backward_plan.minimum_bytes;
    options.in_steps = target().backend != "reference";  // it rounds what it hands on
    expect_equal(whole, run(c, options));
    RunOptions inference;
    inference.inference = true;
    const RunResult result = run(c, inference);
    EXPECT_EQ(bitwise_difference(result.out, whole.out), "");
    EXPECT_EQ(result.rows_dropped, 20);
  }
}

TEST_P(MaxRows, MetadataIsTheHosts) {
  if (target().backend == "reference") GTEST_SKIP() << "the host's own";
  for (const Form form : {Form::kTopK, Form::kPairs}) {
    for (const double part : {0.0, 0.3, 1.0, 1.2}) {
      MoECase c = case_of(target(), form, DType::kBFloat16);
      c.max_rows = static_cast<std::int64_t>(part * static_cast<double>(rows_of(c)));
      SCOPED_TRACE(c.describe());
      const MoEInputs host(host_target(), c);
      const MoEShape shape = host.shape();
      std::vector<std::int32_t> expected(moe_metadata_bytes(shape) / sizeof(std::int32_t));
      const Metadata view = metadata_view(shape, expected.data());
      build_metadata(shape, host.routing(), view);
      check_metadata(shape, view);
      const std::vector<std::byte> actual = run(c).metadata;
      ASSERT_EQ(actual.size(), expected.size() * sizeof(std::int32_t));
      EXPECT_EQ(std::memcmp(actual.data(), expected.data(), actual.size()), 0);
    }
  }
}

// All the other ids are foreign, among them those that a subtraction would make valid.
TEST_P(MaxRows, FirstExpertIsASubtraction) {
  for (const Form form : {Form::kTopK, Form::kPairs}) {
    for (const DType ids : {DType::kInt32, DType::kInt64}) {
      MoECase c = case_of(target(), form, DType::kBFloat16);
      c.id_dtype = ids;
      SCOPED_TRACE(c.describe());
      const RunResult shifted = run(c);
      EXPECT_EQ(join(check_run(c, {}, shifted, Strictness::kTiny)), "");
      MoECase subtracted = c;
      subtracted.first_expert = 0;
      subtracted.fill = [&c](MoEInputs& inputs) {
        MoECase plain = c;
        plain.fill = nullptr;
        const MoEInputs host(host_target(), plain);
        const Tensor& from = c.form == Form::kTopK ? host.topk_ids : host.expert_ids;
        Tensor& to = c.form == Form::kTopK ? inputs.topk_ids : inputs.expert_ids;
        const Values values = from.values();
        std::vector<std::int64_t> ids_from_zero;
        for (const double id : values) {
          const double e = id - static_cast<double>(c.first_expert);
          const bool own = e >= 0 && e < static_cast<double>(c.num_experts);
          ids_from_zero.push_back(own ? static_cast<std::int64_t>(e) : -1);
        }
        to.fill_ids(ids_from_zero);
        if (c.form == Form::kPairs) {
          const Values tokens = host.token_ids.values();
          inputs.token_ids.fill_ids({tokens.begin(), tokens.end()});
        }
      };
      expect_equal(shifted, run(subtracted));
    }
  }
}

TEST_P(MaxRows, AbsentTokensMayStayAsTheyAre) {
  for (const Form form : {Form::kTopK, Form::kPairs}) {
    for (const bool bounded : {false, true}) {
      for (const bool deterministic : {true, false}) {
        MoECase c = case_of(target(), form, DType::kBFloat16);
        c.drop_probability = 0.7;
        c.deterministic = deterministic;
        if (bounded) c.max_rows = rows_of(c) - 7;
        const MoEInputs host(host_target(), c);
        const std::set<std::int64_t> with_rows(host.used_tokens().begin(),
                                               host.used_tokens().end());
        ASSERT_LT(static_cast<std::int64_t>(with_rows.size()), c.num_tokens);
        const RunResult zeros = run(c);
        c.zero_absent_tokens = false;
        SCOPED_TRACE(c.describe());
        const RunResult result = run(c);
        EXPECT_EQ(join(check_run(c, {}, result, Strictness::kTiny)), "");  // of tokens with rows
        if (deterministic) expect_equal(zeros, result);
      }
    }
  }
}

TEST_P(MaxRows, OfALayer) {
  for (const bool rounds : {false, true}) {
    for (const std::int64_t short_by : {-40, 0, 1, 37}) {
      for (const bool in_steps : {false, true}) {
        LayerCase layer;
        layer.experts = case_of(target(), Form::kTopK, DType::kBFloat16);
        layer.experts.first_expert = 0;
        layer.experts.drop_probability = 0.0;
        layer.router.scoring = Scoring::kTopKSoftmax;
        layer.auxiliary = true;
        if (rounds) {
          layer.rounding.emplace();
          layer.rounding->tile = 16;
        }
        std::int64_t rows = layer.experts.pairs();
        if (rounds) {
          LayerRun unbounded(target(), layer);
          unbounded.forward();
          const Values counts = unbounded.rows_per_expert.values();
          rows = 0;
          for (const double count : counts) rows += static_cast<std::int64_t>(count);
        }
        layer.max_rows = rows - short_by;
        SCOPED_TRACE(layer.describe());
        LayerRun run(target(), layer);
        run.forward();
        EXPECT_EQ(run.rows_dropped.values()[0],
                  static_cast<double>(std::max<std::int64_t>(short_by, 0)));
        in_steps ? run.backward_in_steps() : run.backward();
        EXPECT_EQ(join(check_layer(run)), "");
      }
    }
  }
}

}  // namespace
}  // namespace sonicmoe::rig
