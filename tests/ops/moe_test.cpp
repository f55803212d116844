// moe_forward and moe_backward on every backend, against the float64 oracle.
#include <gtest/gtest.h>

#include <limits>

#include "core/metadata.hpp"
#include "ops/tuning.hpp"
#include "rig/compare.hpp"
#include "rig/moe_run.hpp"
#include "sonicmoe/error.hpp"

namespace sonicmoe::rig {
namespace {

using Form = MoEShape::Form;

std::string join(const std::vector<std::string>& lines) {
  std::string text;
  for (const std::string& line : lines) text += line + "\n";
  return text;
}

void expect_correct(const Target& target, const MoECase& wanted, const RunOptions& options = {},
                    Strictness strictness = Strictness::kRealistic) {
  const MoECase c = fitted(target, wanted);
  SCOPED_TRACE(target.backend + ": " + c.describe());
  const RunResult result = run_moe(target, c, options);
  EXPECT_EQ(join(check_run(c, options, result, strictness)), "");
}

class Moe : public ::testing::TestWithParam<Target> {};
INSTANTIATE_TEST_SUITE_P(Backends, Moe, ::testing::ValuesIn(targets()),
                         [](const auto& test) { return test.param.backend; });

TEST_P(Moe, EveryActivationFormAndDtype) {
  std::uint64_t seed = 100;
  for (const Activation activation : all_activations()) {
    for (const Form form : {Form::kTopK, Form::kSorted, Form::kPairs}) {
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
        for (const GateUpLayout layout :
             {GateUpLayout::kConcatenated, GateUpLayout::kInterleaved}) {
          if (!is_gated(activation) && layout == GateUpLayout::kInterleaved) continue;
          MoECase c;
          c.num_tokens = 37;
          c.num_pairs = 71;
          c.hidden_size = 40;
          c.intermediate_size = 36;
          c.activation = activation;
          c.form = form;
          c.dtype = dtype;
          c.gate_up_layout = layout;
          c.biases = seed % 2 == 0;
          c.seed = seed++;
          expect_correct(GetParam(), c);
        }
      }
    }
  }
}

TEST_P(Moe, EveryStrideOfWeightsAndRows) {
  std::uint64_t seed = 300;
  const Strides all[] = {Strides::kContiguous, Strides::kPadded, Strides::kTransposed,
                         Strides::kTransposedPadded};
  for (const Strides w1 : all) {
    for (const Strides w2 : all) {
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
        MoECase c;
        c.w1_strides = w1;
        c.w2_strides = w2;
        c.x_strides = seed % 2 == 0 ? Strides::kPadded : Strides::kContiguous;
        c.gate_up_layout = seed % 3 == 0 ? GateUpLayout::kInterleaved : GateUpLayout::kConcatenated;
        c.dtype = dtype;
        c.num_tokens = 33;
        c.hidden_size = 33;
        c.intermediate_size = 29;
        c.seed = seed++;
        expect_correct(GetParam(), c);
      }
    }
  }
}

TEST_P(Moe, SeveralBlocksOfRowsUnitsAndColumns) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    MoECase c;
    c.num_tokens = 421;
    c.num_experts = 3;
    c.hidden_size = 270;
    c.intermediate_size = 150;
    c.dtype = dtype;
    c.seed = 7;
    expect_correct(GetParam(), c);
  }
}

TEST_P(Moe, DroppedSlotsAndWideIds) {
  std::uint64_t seed = 400;
  for (const Form form : {Form::kTopK, Form::kPairs}) {
    for (const DType id : {DType::kInt32, DType::kInt64}) {
      for (const DType weight : {DType::kFloat32, DType::kBFloat16}) {
        for (const double drop : {0.3, 1.0}) {
          MoECase c;
          c.form = form;
          c.id_dtype = id;
          c.routing_weight_dtype = weight;
          c.drop_probability = drop;
          c.num_tokens = 31;
          c.num_pairs = 80;
          c.seed = seed++;
          expect_correct(GetParam(), c);
        }
      }
    }
  }
}

// Rows may be added to O and dX in any order; with the biases' weights, dropped pairs, tokens
// without rows and an O wider than what is added to at a time.
TEST_P(Moe, SumsInAnyOrder) {
  MoECase c;
  c.deterministic = false;
  c.dtype = DType::kBFloat16;
  c.num_tokens = 331;
  c.num_pairs = 700;
  c.hidden_size = 264;
  c.intermediate_size = 72;
  for (const Form form : {Form::kTopK, Form::kSorted, Form::kPairs}) {
    for (const bool biases : {false, true}) {
      c.form = form;
      c.biases = biases;
      c.routing_weight_dtype = biases ? DType::kBFloat16 : DType::kFloat32;
      c.drop_probability = form == Form::kSorted ? 0.0 : 0.3;
      c.tail_rows = form == Form::kSorted ? 5 : 0;
      c.x_strides = biases ? Strides::kPadded : Strides::kContiguous;
      c.seed++;
      expect_correct(GetParam(), c);
    }
  }
  c.form = Form::kTopK;
  c.drop_probability = 0.0;
  for (const std::int64_t tokens : {0, 1}) {
    c.num_tokens = tokens;
    expect_correct(GetParam(), c, {}, Strictness::kTiny);
  }
  const Forced forced({.add_window = 1 << 20});  // three column tiles of ten at a time
  c.num_tokens = 600;
  c.hidden_size = 2312;
  c.intermediate_size = 24;
  expect_correct(GetParam(), c);
}

TEST_P(Moe, RowsPastTheEndAreNeverRead) {
  for (const bool weights : {true, false}) {
    for (const std::int64_t tail : {1, 29}) {
      MoECase c;
      c.form = Form::kSorted;
      c.tail_rows = tail;
      c.row_weights = weights;
      c.seed = static_cast<std::uint64_t>(tail);
      expect_correct(GetParam(), c);
    }
  }
}

TEST_P(Moe, DegenerateShapes) {
  std::uint64_t seed = 500;
  for (const Form form : {Form::kTopK, Form::kSorted, Form::kPairs}) {
    for (const std::int64_t tokens : {0, 1, 2}) {
      for (const std::int64_t experts : {1, 7}) {
        for (const std::int64_t k : {std::int64_t{1}, experts}) {
          MoECase c;
          c.form = form;
          c.num_tokens = tokens;
          c.num_pairs = tokens * k;
          c.num_experts = experts;
          c.top_k = k;
          c.hidden_size = seed % 2 == 0 ? 1 : 9;
          c.intermediate_size = seed % 3 == 0 ? 1 : 5;
          c.seed = seed++;
          expect_correct(GetParam(), c, {}, Strictness::kTiny);
        }
      }
    }
  }
}

TEST_P(Moe, SkewedLoads) {
  for (const Load load : {Load::kOneExpert, Load::kSomeEmpty}) {
    for (const Form form : {Form::kTopK, Form::kSorted, Form::kPairs}) {
      MoECase c;
      c.load = load;
      c.form = form;
      c.num_tokens = 300;
      c.num_pairs = 520;
      c.num_experts = 9;
      c.top_k = load == Load::kOneExpert ? 1 : 2;
      c.seed = 11;
      expect_correct(GetParam(), c);
    }
  }
}

TEST_P(Moe, SmallIntegersAreExact) {
  std::uint64_t seed = 600;
  for (const Activation activation : {Activation::kReGLU, Activation::kReLU}) {
    for (const Form form : {Form::kTopK, Form::kSorted, Form::kPairs}) {
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
        MoECase c;
        c.values = Numbers::kIntegers;
        c.activation = activation;
        c.form = form;
        c.dtype = dtype;
        c.num_tokens = 9;
        c.num_pairs = 17;
        c.hidden_size = 5;
        c.intermediate_size = 4;
        c.seed = seed++;
        SCOPED_TRACE(GetParam().backend + ": " + c.describe());
        EXPECT_EQ(join(check_run_exactly(fitted(GetParam(), c), {}, run_moe(GetParam(), c))), "");
      }
    }
  }
}

TEST_P(Moe, InferenceGivesTheBitsOfTraining) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    MoECase c;
    c.dtype = dtype;
    c.num_tokens = 50;
    RunOptions inference;
    inference.inference = true;
    const RunResult a = run_moe(GetParam(), c);
    const RunResult b = run_moe(GetParam(), c, inference);
    EXPECT_EQ(bitwise_difference(a.out, b.out), "");
    EXPECT_EQ(join(b.violations), "");
  }
}

TEST_P(Moe, EqualBitsForEveryRunAndThreadCount) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    MoECase c;
    c.dtype = dtype;
    c.num_tokens = 200;
    c.hidden_size = 72;
    c.num_experts = 6;
    c.top_k = 3;
    RunOptions options;
    options.num_threads = 1;
    const RunResult once = run_moe(GetParam(), c, options);
    for (const int threads : {1, 2, 3, 8}) {
      options.num_threads = threads;
      EXPECT_EQ(bitwise_difference(once, run_moe(GetParam(), c, options)), "") << threads;
    }
  }
}

TEST_P(Moe, WorkspaceLimitIsKeptAndChangesNoBit) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    MoECase c;
    c.dtype = dtype;
    c.num_tokens = 120;
    c.hidden_size = 2100;
    c.num_experts = 4;
    const RunResult whole = run_moe(GetParam(), c);
    EXPECT_EQ(whole.forward_plan.num_slabs, 1);
    RunOptions limited;
    limited.forward_limit = whole.forward_plan.minimum_bytes;
    limited.backward_limit = whole.backward_plan.minimum_bytes;
    const RunResult slabs = run_moe(GetParam(), c, limited);
    EXPECT_EQ(bitwise_difference(whole, slabs), "");
    EXPECT_EQ(join(slabs.violations), "");
    EXPECT_LE(slabs.forward_plan.bytes, *limited.forward_limit);
    EXPECT_LE(slabs.backward_plan.bytes, *limited.backward_limit);
    if (GetParam().backend == "reference") continue;  // it needs no scratch to begin with
    EXPECT_GT(slabs.forward_plan.num_slabs, 1);
    EXPECT_GT(slabs.backward_plan.num_slabs, 1);
    limited.forward_limit = (whole.forward_plan.minimum_bytes + whole.forward_plan.bytes) / 2;
    limited.backward_limit = (whole.backward_plan.minimum_bytes + whole.backward_plan.bytes) / 2;
    const RunResult some = run_moe(GetParam(), c, limited);
    EXPECT_EQ(bitwise_difference(whole, some), "");
    EXPECT_LT(some.forward_plan.num_slabs, slabs.forward_plan.num_slabs);
  }
}

// Four calls, with dH, A' and the row lists of the caller's, as one.
TEST_P(Moe, BackwardInStepsGivesTheBitsOfOneCall) {
  if (GetParam().backend == "reference") GTEST_SKIP() << "it rounds what it hands on";
  std::uint64_t seed = 800;
  for (const Form form : {Form::kTopK, Form::kSorted, Form::kPairs}) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (const GateUpLayout layout : {GateUpLayout::kConcatenated, GateUpLayout::kInterleaved}) {
        MoECase c;
        c.form = form;
        c.dtype = dtype;
        c.gate_up_layout = layout;
        c.num_tokens = 120;
        c.num_pairs = 250;
        c.hidden_size = seed % 2 == 0 ? 2100 : 72;
        c.drop_probability = form == Form::kSorted ? 0.0 : 0.2;
        c.tail_rows = form == Form::kSorted ? 7 : 0;
        c.w1_strides = seed % 3 == 0 ? Strides::kTransposed : Strides::kContiguous;
        c.seed = seed++;
        SCOPED_TRACE(GetParam().backend + ": " + c.describe());
        RunOptions options;
        options.gradient_dtype = DType::kFloat32;
        options.accumulate = seed % 2 == 0;
        options.accumulate_onto = options.accumulate ? 1.0 : 0.0;
        const RunResult whole = run_moe(GetParam(), c, options);
        options.in_steps = true;
        for (const bool limited : {false, true}) {
          if (limited) options.backward_limit = whole.backward_plan.minimum_bytes;
          const RunResult steps = run_moe(GetParam(), c, options);
          EXPECT_EQ(bitwise_difference(whole, steps), "");
          EXPECT_EQ(join(steps.violations), "");
        }
      }
    }
  }
}

TEST_P(Moe, BackwardInStepsIsCorrect) {
  for (const Form form : {Form::kTopK, Form::kSorted, Form::kPairs}) {
    MoECase c;
    c.form = form;
    c.num_tokens = 37;
    c.num_pairs = 71;
    c.seed = 900;
    RunOptions options;
    options.in_steps = true;
    for (const unsigned gradients : {unsigned{kAllGradients}, kGradX | kGradB2, kGradW1 | kGradB1,
                                     unsigned{kGradRoutingWeights}}) {
      options.gradients = gradients;
      expect_correct(GetParam(), c, options);
    }
  }
}

TEST_P(Moe, WorkspaceLimitBelowTheMinimumNamesIt) {
  MoECase c;
  const MoEInputs inputs(GetParam(), c);
  const Context context = GetParam().context();
  const WorkspacePlan forward = moe_forward_workspace(context, inputs.shape());
  const WorkspacePlan backward = moe_backward_workspace(context, inputs.shape());
  const auto expect_minimum = [](std::size_t minimum, auto plan) {
    try {
      plan(minimum - 1);
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.argument(), "workspace_limit");
      EXPECT_NE(std::string(error.what()).find(std::to_string(minimum)), std::string::npos);
    }
  };
  expect_minimum(forward.minimum_bytes, [&](std::size_t limit) {
    moe_forward_workspace(context, inputs.shape(), false, limit);
  });
  expect_minimum(backward.minimum_bytes, [&](std::size_t limit) {
    moe_backward_workspace(context, inputs.shape(), limit);
  });
}

TEST_P(Moe, AccumulatesIntoFloat32) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const Strides strides : {Strides::kContiguous, Strides::kTransposed}) {
      MoECase c;
      c.dtype = dtype;
      c.w1_strides = c.w2_strides = strides;
      c.load = Load::kSomeEmpty;
      c.num_tokens = 40;
      RunOptions options;
      options.gradient_dtype = DType::kFloat32;
      expect_correct(GetParam(), c, options);
      options.accumulate = true;
      options.accumulate_onto = 3.0;
      expect_correct(GetParam(), c, options);
    }
  }
}

TEST_P(Moe, EverySubsetOfGradientsGivesTheSameBits) {
  MoECase c;
  c.num_tokens = 23;
  const RunResult all = run_moe(GetParam(), c);
  const auto same = [](const std::vector<double>& some, const std::vector<double>& every) {
    return some.empty() ? std::string() : bitwise_difference(some, every);
  };
  for (unsigned gradients = 0; gradients <= kAllGradients; ++gradients) {
    RunOptions options;
    options.gradients = gradients;
    const RunResult some = run_moe(GetParam(), c, options);
    SCOPED_TRACE(gradients);
    EXPECT_EQ(some.grad_x.empty(), (gradients & kGradX) == 0);
    EXPECT_EQ(some.grad_w1.empty(), (gradients & kGradW1) == 0);
    EXPECT_EQ(same(some.grad_x, all.grad_x), "");
    EXPECT_EQ(same(some.grad_w1, all.grad_w1), "");
    EXPECT_EQ(same(some.grad_b1, all.grad_b1), "");
    EXPECT_EQ(same(some.grad_w2, all.grad_w2), "");
    EXPECT_EQ(same(some.grad_b2, all.grad_b2), "");
    EXPECT_EQ(same(some.grad_routing_weights, all.grad_routing_weights), "");
    EXPECT_EQ(join(some.violations), "");
  }
}

TEST_P(Moe, MetadataAndHTakeTheBytesOfTheFormula) {
  MoECase c;
  const MoEInputs inputs(GetParam(), c);
  const MoEShape shape = inputs.shape();
  const std::int64_t pairs = c.num_tokens * c.top_k;
  EXPECT_EQ(moe_h_bytes(shape),
            static_cast<std::size_t>(pairs * 2 * c.intermediate_size) * sizeof(float));
  EXPECT_EQ(moe_metadata_bytes(shape), static_cast<std::size_t>(4 * (c.num_experts + 3 * pairs)));
}

// Tokens without, with some, with duplicate and with all pairs; token counts around what one CTA of
// the CUDA backend scans, pairs around what one counts.
TEST_P(Moe, MetadataIsTheHosts) {
  if (GetParam().backend == "reference") GTEST_SKIP() << "it makes none";
  struct Size {
    Form form;
    std::int64_t tokens, pairs, experts;
  };
  std::uint64_t seed = 700;
  for (const Size size : {
           Size{Form::kTopK, 1500, 3000, 40},
           Size{Form::kPairs, 1, 1, 1},
           Size{Form::kPairs, 1, 1500, 5},
           Size{Form::kPairs, 3, 1024, 2},
           Size{Form::kPairs, 70, 1025, 300},
           Size{Form::kPairs, 4094, 5000, 33},
           Size{Form::kPairs, 4095, 5000, 33},
           Size{Form::kPairs, 4096, 2047, 33},
           Size{Form::kPairs, 4097, 5000, 33},
           Size{Form::kPairs, 13001, 4000, 7},
           Size{Form::kPairs, 100, 0, 4},
       }) {
    MoECase wanted;
    wanted.form = size.form;
    wanted.num_tokens = size.tokens;
    wanted.num_pairs = size.pairs;
    wanted.num_experts = size.experts;
    wanted.hidden_size = wanted.intermediate_size = 8;
    wanted.drop_probability = 0.1;
    wanted.seed = seed++;
    const MoECase c = fitted(GetParam(), wanted);
    SCOPED_TRACE(GetParam().backend + ": " + c.describe());
    const MoEInputs inputs(host_target(), c);
    std::vector<std::byte> expected(moe_metadata_bytes(inputs.shape()));
    build_metadata(inputs.shape(), inputs.routing(),
                   metadata_view(inputs.shape(), expected.data()));
    const RunResult result = run_moe(GetParam(), c);
    EXPECT_TRUE(result.metadata == expected);
    EXPECT_EQ(join(result.violations), "");
  }
}

}  // namespace
}  // namespace sonicmoe::rig
