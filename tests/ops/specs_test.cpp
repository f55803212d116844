// Every configuration of the Hopper kernels, not only the one that select.cpp picks: tile widths,
// who stores dH, boxes and grids are forced (tuning.hpp). Poison and SONICMOE_CUDA_STRESS are as in
// hazards_test.cpp.
#include <gtest/gtest.h>

#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "ops/hazards.hpp"
#include "ops/tuning.hpp"
#include "rig/random.hpp"

namespace sonicmoe::rig {
namespace {

class Specs : public Hazards {};
INSTANTIATE_TEST_SUITE_P(Backends, Specs, ::testing::ValuesIn(targets()),
                         [](const auto& test) { return test.param.backend; });

const std::vector<Tuning> kForced = {{.block_n = 128, .stores = StoreRoles::kThreeAndMath},
                                     {.block_n = 128, .stores = StoreRoles::kThree},
                                     {.block_n = 128, .stores = StoreRoles::kTwo},
                                     {.block_n = 256, .stores = StoreRoles::kThreeAndMath},
                                     {.block_n = 256, .stores = StoreRoles::kThree},
                                     {.block_n = 256, .stores = StoreRoles::kTwo},
                                     {.block_n = 256, .sort_rows = true, .start_together = true}};

// What to force: all of `values` on a GPU; other backends do not read them and run the first alone.
template <class T = int>
std::vector<T> of_cuda(const Target& target, std::vector<T> values) {
  if (target.backend != "cuda") values.resize(1);
  return values;
}

// The three layouts of a row of H.
constexpr std::pair<Activation, GateUpLayout> kHiddenLayouts[] = {
    {Activation::kSwiGLU, GateUpLayout::kConcatenated},
    {Activation::kSwiGLU, GateUpLayout::kInterleaved},
    {Activation::kGELU, GateUpLayout::kConcatenated},
};

// Tile width, who stores dH, K-major and MN-major weights, the three layouts of H, and the three
// ways a weight gradient leaves: every configuration that specs.cuh allows, not only select.cpp's
// choice.
TEST_P(Specs, EveryLegalSpec) {
  for (const Tuning& wanted : of_cuda(GetParam(), kForced)) {
    const Forced forced(wanted);
    for (const auto& [activation, layout] : kHiddenLayouts) {
      for (const Strides strides : {Strides::kContiguous, Strides::kTransposed}) {
        for (const DType gradient : {DType::kBFloat16, DType::kFloat32}) {
          SCOPED_TRACE("gradients " + std::string(sonicmoe::name_of(gradient)));
          MoECase c = many_tiles();
          c.num_tokens = 150;
          if (wanted.sort_rows) c.hidden_size = 320;  // else they cannot be read
          c.activation = activation;
          c.gate_up_layout = layout;
          c.w1_strides = c.w2_strides = strides;
          RunOptions options;
          options.gradient_dtype = gradient;
          expect_correct(c, options);
        }
      }
    }
  }
}

// Gate and up boxes of several blocks of 64 columns: n of 3 and 7 blocks, so that the last boxes
// have blocks past the end; and n = 168, interleaved, where the last block ends within the lanes'
// second runs. Weights are read with and without unit stride along the reduction.
TEST_P(Specs, BoxesOfSeveralBlocksOfColumns) {
  for (const int block_n : of_cuda(GetParam(), {0, 128, 256})) {
    const Forced forced({.block_n = block_n});
    for (const std::int64_t width : {192, 168, 448}) {
      for (const Strides w1 : {Strides::kContiguous, Strides::kTransposed}) {
        for (const Strides w2 : {Strides::kContiguous, Strides::kTransposed}) {
          MoECase c = small_case();
          c.num_tokens = 45;
          c.num_experts = 3;
          c.hidden_size = 192;
          c.intermediate_size = width;
          c.w1_strides = w1;
          c.w2_strides = w2;
          c.seed = static_cast<std::uint64_t>(1100 + width);
          if (width % 64 != 0) c.gate_up_layout = GateUpLayout::kInterleaved;
          expect_correct(c);
        }
      }
    }
  }
}

// Rows of each expert: reductions over 0 to 4 k-tiles, whole and partial, that follow each other.
constexpr std::int64_t kRowsOfExperts[] = {0, 1, 63, 64,  65, 128, 129, 0,
                                           0, 2, 64, 200, 1,  1,   130, 64};

// Routes inputs whose every token is used: as many rows to each expert as kRowsOfExperts says.
void route_as_wanted(MoEInputs& inputs) {
  const MoECase& c = inputs.description;
  std::vector<std::int64_t> experts, ends;
  for (std::size_t e = 0; e < std::size(kRowsOfExperts); ++e) {
    experts.insert(experts.end(), static_cast<std::size_t>(kRowsOfExperts[e]),
                   static_cast<std::int64_t>(e));
    ends.push_back(static_cast<std::int64_t>(experts.size()));
  }
  ASSERT_EQ(c.pairs(), ends.back());
  ASSERT_EQ(c.num_experts, static_cast<std::int64_t>(ends.size()));
  if (c.form == Form::kSorted) return inputs.offsets.fill_ids(ends);
  Random random(c.seed);
  for (std::size_t i = experts.size(); i > 1; --i) {
    const std::int64_t other = random.integer(0, static_cast<std::int64_t>(i) - 1);
    std::swap(experts[i - 1], experts[static_cast<std::size_t>(other)]);
  }
  (c.form == Form::kTopK ? inputs.topk_ids : inputs.expert_ids).fill_ids(experts);
}

// The reductions of the weight gradients, tile after tile of one CTA: three column tiles of X and
// one or several of H, with the k-tiles of one expert behind those of another.
TEST_P(Specs, ExpertsOfEveryNumberOfKTiles) {
  struct Wanted {
    Form form;
    std::int64_t width;
  };
  for (const Wanted& wanted :
       {Wanted{Form::kTopK, 72}, Wanted{Form::kTopK, 328}, Wanted{Form::kPairs, 72},
        Wanted{Form::kSorted, 72}, Wanted{Form::kSorted, 328}}) {
    if (wanted.width > 72 && GetParam().backend != "cuda") continue;  // several column tiles
    MoECase c = small_case();
    c.form = wanted.form;
    c.num_experts = static_cast<std::int64_t>(std::size(kRowsOfExperts));
    c.num_pairs = 912;
    c.num_tokens = 456;
    c.top_k = 2;
    c.hidden_size = 320;
    c.intermediate_size = wanted.width;
    c.seed = static_cast<std::uint64_t>(1200 + wanted.width);
    c.fill = route_as_wanted;
    const RunResult whole = expect_correct(c);
    for (const int grid : of_cuda(GetParam(), {1, 2})) {
      const Forced forced({.grid = grid});
      SCOPED_TRACE(c.describe());
      const RunResult other = run_moe(GetParam(), c);
      EXPECT_EQ(bitwise_difference(whole, other), "");
      EXPECT_TRUE(other.violations.empty()) << other.violations.front();
    }
  }
}

// Weight gradients from a copy of sorted rows and from gathered ones: experts of every number of
// rows; one, two and five blocks of d, which tiles of 128 divide or not; column tiles that end
// within a box; NaN in what nobody wrote (rig/moe_run.hpp) between the copies of last steps.
std::vector<MoECase> cases_of_sorted_rows() {
  std::vector<MoECase> cases;
  const auto add = [&](auto change) {
    MoECase c = many_tiles();
    c.hidden_size = 320;
    change(c);
    cases.push_back(c);
  };
  const auto every_number_of_rows = [](MoECase& c) {
    c.num_experts = static_cast<std::int64_t>(std::size(kRowsOfExperts));
    c.num_pairs = 912;
    c.num_tokens = 456;
    c.fill = route_as_wanted;
  };
  add([&](MoECase& c) { every_number_of_rows(c); });
  add([&](MoECase& c) {
    every_number_of_rows(c);
    c.form = Form::kPairs;
    c.intermediate_size = 328;
  });
  for (const std::int64_t width : {64, 128, 192}) {
    add([&](MoECase& c) { c.hidden_size = width; });
  }
  for (const Load load : {Load::kOneExpert, Load::kSomeEmpty}) {
    add([&](MoECase& c) {
      c.load = load;
      c.num_experts = 9;
    });
  }
  add([](MoECase& c) { c.w1_strides = c.w2_strides = Strides::kTransposed; });
  add([](MoECase& c) { c.x_strides = Strides::kPadded; });
  add([](MoECase& c) { c.drop_probability = 0.9; });
  add([](MoECase& c) { c.max_rows = 300; });  // in the middle of an expert
  add([](MoECase& c) { c.max_rows = 0; });
  add([](MoECase& c) { c.num_tokens = 1; });
  add([](MoECase& c) { c.num_tokens = 0; });
  add([](MoECase& c) {  // whole boxes of columns
    c.intermediate_size = 256;
    c.activation = Activation::kGELU;
  });
  return cases;
}

TEST_P(Specs, SortedRowsGiveTheSameBits) {
  if (GetParam().backend != "cuda") GTEST_SKIP() << "nothing else reads what this test forces";
  for (const MoECase& wanted : cases_of_sorted_rows()) {
    const MoECase c = fitted(GetParam(), wanted);
    SCOPED_TRACE(c.describe());
    for (const DType gradient : {DType::kBFloat16, DType::kFloat32}) {
      RunOptions options;
      options.gradient_dtype = gradient;
      options.accumulate = gradient == DType::kFloat32;
      options.accumulate_onto = options.accumulate ? 1.0 : 0.0;
      const auto run = [&](bool sorts, int grid) {
        const Forced forced({.block_n = 256, .grid = grid, .sort_rows = sorts});
        return grid == 0 && sorts ? expect_correct(c, options) : run_moe(GetParam(), c, options);
      };
      const RunResult gathered = run(false, 0);
      for (const int grid : {0, 1, 7}) {
        const RunResult sorted = run(true, grid);
        EXPECT_EQ(bitwise_difference(gathered, sorted), "") << "grid " << grid;
        EXPECT_TRUE(sorted.violations.empty()) << sorted.violations.front();
        EXPECT_EQ(sorted.backward_plan.bytes > gathered.backward_plan.bytes, c.row_capacity() > 0);
        EXPECT_EQ(sorted.backward_plan.minimum_bytes, gathered.backward_plan.minimum_bytes);
      }
    }
  }
}

// The copy in one call and in steps, with just enough room for it and with a byte less.
TEST_P(Specs, SortedRowsUnderALimitAndInSteps) {
  if (GetParam().backend != "cuda") GTEST_SKIP() << "nothing else reads what this test forces";
  MoECase wanted = many_tiles();
  wanted.hidden_size = 576;
  for (const Form form : {Form::kTopK, Form::kPairs, Form::kSorted}) {
    wanted.form = form;
    wanted.num_pairs = 700;
    const MoECase c = fitted(GetParam(), wanted);
    SCOPED_TRACE(c.describe());
    const auto run = [&](bool sorts, const RunOptions& options = {}) {
      const Forced forced({.block_n = 256, .sort_rows = sorts});
      return run_moe(GetParam(), c, options);
    };
    const RunResult gathered = run(false), sorted = run(true);
    EXPECT_EQ(bitwise_difference(gathered, sorted), "");
    const std::size_t without = gathered.backward_plan.bytes, with = sorted.backward_plan.bytes;
    EXPECT_EQ(with > without, form != Form::kSorted);  // whose rows lie in order
    for (const bool in_steps : {false, true}) {
      for (const std::size_t limit : {with, with - 1, sorted.backward_plan.minimum_bytes}) {
        if (limit < sorted.backward_plan.minimum_bytes) continue;  // sorted rows have one slab
        RunOptions options;
        options.in_steps = in_steps;
        options.backward_limit = limit;
        const RunResult limited = run(true, options);
        EXPECT_EQ(bitwise_difference(gathered, limited), "") << "limit " << limit;
        EXPECT_TRUE(limited.violations.empty()) << limited.violations.front();
        if (limit == with) {
          EXPECT_EQ(limited.backward_plan.bytes, with);
        } else {
          EXPECT_LE(limited.backward_plan.bytes, without);
        }
      }
    }
  }
}

// CTAs that wait for each other: with one, with more than there are tiles, with those that claim
// many; again and again, since each launch leaves the counters to the next.
TEST_P(Specs, StartingTogetherGivesTheSameBits) {
  if (GetParam().backend != "cuda") GTEST_SKIP() << "nothing else reads what this test forces";
  MoECase sorted = many_tiles(), none = many_tiles(), large = many_tiles();
  sorted.form = Form::kSorted;
  sorted.num_pairs = 1090;
  none.num_tokens = 0;
  large.num_tokens = 1500;
  large.num_experts = 4;
  large.hidden_size = 1032;
  large.intermediate_size = 520;
  for (const MoECase& wanted : {many_tiles(), sorted, none, large}) {
    const MoECase c = fitted(GetParam(), wanted);
    SCOPED_TRACE(c.describe());
    for (const int block_n : {128, 256}) {
      const auto run = [&](bool together, int grid, int rows) {
        const Forced forced(
            {.block_n = block_n, .grid = grid, .row_block = rows, .start_together = together});
        return run_moe(GetParam(), c);
      };
      const RunResult expected = run(false, 0, 1);
      for (const int grid : {0, 1, 7}) {
        for (const int rows : {1, 3}) {
          const RunResult other = run(true, grid, rows);
          EXPECT_EQ(bitwise_difference(expected, other), "") << "grid " << grid;
          EXPECT_TRUE(other.violations.empty()) << other.violations.front();
        }
      }
    }
  }
}

TEST_P(Specs, EveryGridGivesTheSameBits) {
  const MoECase c = fitted(GetParam(), many_tiles());
  expect_correct(c);
  const RunResult whole = run_moe(GetParam(), c);
  EXPECT_EQ(bitwise_difference(whole, run_moe(GetParam(), c)), "");
  for (Tuning wanted : of_cuda(GetParam(), kForced)) {
    const RunResult expected = [&] {
      const Forced forced(wanted);
      return run_moe(GetParam(), c);
    }();
    for (const int grid : {1, 2, 7, 131}) {
      wanted.grid = grid;
      const Forced forced(wanted);
      EXPECT_EQ(bitwise_difference(expected, run_moe(GetParam(), c)), "");
    }
  }
}

// In which order tiles are computed changes nothing in the results: blocks of tile rows that divide
// an expert's or do not, for experts of 0 to 9 tiles; strided and in order.
TEST_P(Specs, BlocksOfTileRowsGiveTheSameBits) {
  if (GetParam().backend != "cuda") GTEST_SKIP() << "nothing else reads what this test forces";
  MoECase sorted = many_tiles(), ungated = many_tiles(), large = many_tiles();
  sorted.form = Form::kSorted;
  sorted.num_pairs = 1090;
  ungated.activation = Activation::kGELU;
  large.num_tokens = 1500;
  large.num_experts = 4;
  large.hidden_size = 1032;
  large.intermediate_size = 520;
  for (const MoECase& wanted : {many_tiles(), sorted, ungated, large}) {
    const MoECase c = fitted(GetParam(), wanted);
    SCOPED_TRACE(c.describe());
    for (const int block_n : {128, 256}) {
      const auto run = [&](int rows, int grid) {
        const Forced forced({.block_n = block_n, .grid = grid, .row_block = rows});
        return run_moe(GetParam(), c);
      };
      const RunResult expected = run(1, 0);
      for (const int rows : {2, 3, 16}) {
        for (const int grid : {0, 7}) {
          const RunResult other = run(rows, grid);
          EXPECT_EQ(bitwise_difference(expected, other), "")
              << "block_n " << block_n << ", row_block " << rows << ", grid " << grid;
          EXPECT_TRUE(other.violations.empty()) << other.violations.front();
        }
      }
    }
  }
}

// Every product in order, where some would be strided; grids that claim once and many times.
TEST_P(Specs, SharedDevicesGiveTheSameBits) {
  Target shared = GetParam();
  shared.shared_device = true;
  MoECase sorted = many_tiles(), ungated = many_tiles();
  sorted.form = Form::kSorted;
  sorted.num_pairs = 1090;
  ungated.activation = Activation::kGELU;
  for (const MoECase& wanted : {many_tiles(), sorted, ungated}) {
    const MoECase c = fitted(GetParam(), wanted);
    SCOPED_TRACE(c.describe());
    const RunResult alone = expect_correct(c);
    for (const int grid : of_cuda(GetParam(), {0, 1, 2, 7, 131})) {
      const Forced forced({.grid = grid});
      const RunResult other = run_moe(shared, c);
      EXPECT_EQ(bitwise_difference(alone, other), "");
      EXPECT_TRUE(other.violations.empty()) << other.violations.front();
    }
  }
}

// Who stores dH changes nothing in the results: tiles of every height, gated in both layouts and
// not.
TEST_P(Specs, RowsThatTheMathWarpsStore) {
  if (GetParam().backend != "cuda") GTEST_SKIP() << "nothing else reads what this test forces";
  std::vector<MoECase> cases;
  for (const std::int64_t rows : {1, 4, 5, 12, 13, 16, 29, 47, 64, 65, 77, 113, 128, 190}) {
    cases.push_back(one_expert(rows));
  }
  for (const auto& [activation, layout] : kHiddenLayouts) {
    cases.push_back(many_tiles());
    cases.back().activation = activation;
    cases.back().gate_up_layout = layout;
  }
  for (const MoECase& wanted : cases) {
    const MoECase c = fitted(GetParam(), wanted);
    SCOPED_TRACE(c.describe());
    for (const int block_n : {128, 256}) {
      const auto run = [&](StoreRoles stores) {
        const Forced forced({.block_n = block_n, .stores = stores});
        return run_moe(GetParam(), c);
      };
      EXPECT_EQ(bitwise_difference(run(StoreRoles::kThree), run(StoreRoles::kThreeAndMath)), "");
    }
  }
}

// The kernels of a SONICMOE_CUDA_STRESS build slow one role of every CTA down, another one each
// 131 us: whatever waits for too little then reads too early in some call.
TEST_P(Specs, DelaysInEveryRoleChangeNoBit) {
#if !defined(SONICMOE_STRESS)
  GTEST_SKIP() << "configure with -DSONICMOE_CUDA_STRESS=ON";
#endif
  MoECase interleaved = many_tiles(), ungated = many_tiles();
  interleaved.gate_up_layout = GateUpLayout::kInterleaved;
  ungated.activation = Activation::kGELU;
  ungated.hidden_size = 320;  // of which sorted rows can be read
  for (const MoECase& wanted :
       {one_expert(65), one_expert(129), one_expert(321), many_tiles(), interleaved, ungated}) {
    for (const Tuning& tuning : of_cuda(GetParam(), kForced)) {
      const Forced forced(tuning);
      const MoECase c = fitted(GetParam(), wanted);
      SCOPED_TRACE(c.describe());
      expect_correct(c);
      const RunResult first = run_moe(GetParam(), c);
      for (int i = 0; i < repeats(); ++i) {
        ASSERT_EQ(bitwise_difference(first, run_moe(GetParam(), c)), "") << "call " << i;
      }
    }
  }
}

}  // namespace
}  // namespace sonicmoe::rig
