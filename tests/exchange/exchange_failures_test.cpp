// A rank that does not come, comes late or makes another call: one clear error on every rank that
// waits for it, which names both, within the timeout. On every backend.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <functional>
#include <thread>

#include "layer/host_exchange.hpp"
#include "rig/exchange_group.hpp"
#include "sonicmoe/error.hpp"

namespace sonicmoe::rig {
namespace {

using ::testing::AllOf;
using ::testing::Each;
using ::testing::HasSubstr;
using ::testing::StartsWith;

ExchangeCase case_of(const Target& target, int num_ranks, double timeout_seconds) {
  ExchangeCase c;
  c.layer.num_tokens = 8 * num_ranks;
  c.layer.num_experts = 8;
  c.layer.hidden_size = 16;
  c.layer.intermediate_size = 16;
  c.layer = fitted(target, c.layer);
  c.tokens = spread_tokens(c.layer.num_tokens, num_ranks);
  c.timeout_seconds = timeout_seconds;
  return c;
}

// Sets what ranks do after a wait, and takes it back.
class Pause {
 public:
  explicit Pause(void (*pause)(int)) { set_pause_after_waits(pause); }
  ~Pause() { set_pause_after_waits(nullptr); }
};

class ExchangeFailures : public ::testing::TestWithParam<Target> {
 protected:
  const Target& target() const { return GetParam(); }
  bool on_gpu() const { return target().device.type == DeviceType::kCuda; }

  // On a GPU, where an operation has returned before it fails: nothing may look like a result.
  void expect_no_results(ExchangeGroup& group, int rank) const {
    if (!on_gpu()) return;
    for (const double value : group.rank(rank).out.values()) ASSERT_TRUE(std::isnan(value));
  }
};
INSTANTIATE_TEST_SUITE_P(Backends, ExchangeFailures, ::testing::ValuesIn(targets()),
                         [](const auto& test) { return test.param.backend; });

TEST_P(ExchangeFailures, ARankThatNeverComesIsNamedByAllOthers) {
  ExchangeGroup group(target(), case_of(target(), 4, 0.2));
  const auto errors = group.run([&](int r) {
    if (r != 2) group.forward(r);
  });
  for (const int r : {0, 1, 3}) {
    EXPECT_EQ(errors[static_cast<std::size_t>(r)],
              std::string(on_gpu() ? "exchange" : "moe_exchange_forward") + ": rank " +
                  std::to_string(r) +
                  " waited 0.2 s for rank 2 to publish call 1 (forward, 8 tokens); it has made no "
                  "call");
    expect_no_results(group, r);
  }
  EXPECT_EQ(errors[2], "");
}

TEST_P(ExchangeFailures, ARankThatLeavesBetweenCallsIsNamedWithItsLastCall) {
  ExchangeGroup group(target(), case_of(target(), 2, 0.2));
  group.forward();
  const auto errors = group.run([&](int r) {
    if (r == 0) group.backward(r);
  });
  EXPECT_THAT(errors[0], HasSubstr("rank 0 waited 0.2 s for rank 1 to publish call 2 (backward, 8 "
                                   "tokens); its last was call 1 (forward, 8 tokens)"));
  EXPECT_EQ(errors[1], "");
}

TEST_P(ExchangeFailures, AnExchangeThatFailedSaysSoAgain) {
  ExchangeGroup group(target(), case_of(target(), 2, 0.2));
  (void)group.run([&](int r) {
    if (r == 0) group.forward(r);
  });
  const auto errors = group.run([&](int r) {
    if (r == 0) group.backward(r);
  });
  EXPECT_THAT(errors[0], AllOf(StartsWith("moe_exchange_backward: rank 0 waited"),
                               HasSubstr("to publish call 1 (forward")));
  EXPECT_THROW(group.rank(0).exchange->check(), Error);
  EXPECT_NO_THROW(group.rank(1).exchange->check());
}

TEST_P(ExchangeFailures, AnotherOrderOfCallsIsSeenAtOnce) {
  ExchangeGroup group(target(), case_of(target(), 4, 300.0));
  group.forward();
  const auto begin = std::chrono::steady_clock::now();
  const auto errors = group.run([&](int r) { r == 1 ? group.backward(r) : group.forward(r); });
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(100));  // no timeout
  EXPECT_THAT(errors, Each(HasSubstr("all ranks have to make the same calls in the same order")));
  EXPECT_THAT(errors[0], HasSubstr("rank 0 is in call 2 (forward, 8 tokens), rank 1 in call 2 "
                                   "(backward, 8 tokens)"));
  EXPECT_THAT(errors[1], HasSubstr("rank 1 is in call 2 (backward, 8 tokens), rank 0 in call 2 "
                                   "(forward, 8 tokens)"));
}

TEST_P(ExchangeFailures, OtherOptionsAreSeenAtOnce) {
  ExchangeGroup group(target(), case_of(target(), 2, 300.0));
  const auto errors = group.run([&](int r) {
    MoEExchangeForwardArgs args = group.forward_args(r);
    if (r == 1) args.options.gate_up_layout = GateUpLayout::kInterleaved;
    moe_exchange_forward(group.context(r), *group.rank(r).exchange, args);
  });
  EXPECT_THAT(errors[0],
              HasSubstr("rank 0 and rank 1 differ in sizes, dtype or options of call 1 (forward"));
  EXPECT_THAT(errors[1], HasSubstr("rank 1 and rank 0 differ"));
}

// The layer of one rank fails between the waits: the others learn it at the second.
TEST_P(ExchangeFailures, ARankThatEndsWithinACallIsNamed) {
  if (on_gpu()) GTEST_SKIP() << "kernels do not end half-way";
  ExchangeGroup group(target(), case_of(target(), 4, 0.2));
  const Pause pause([](int rank) {
    if (rank == 3) throw std::runtime_error("ended by the test");
  });
  const auto errors = group.run([&](int r) { group.forward(r); });
  for (const int r : {0, 1, 2}) {
    EXPECT_THAT(errors[static_cast<std::size_t>(r)],
                HasSubstr("waited 0.2 s for rank 3 to end its part of call 1 (forward, 8 tokens)"));
  }
  EXPECT_EQ(errors[3], "moe_exchange_forward: ended by the test");
}

TEST_P(ExchangeFailures, ALateRankIsWaitedFor) {
  if (on_gpu()) GTEST_SKIP() << "one thread enqueues for all ranks";
  const ExchangeCase c = case_of(target(), 4, 60.0);
  ExchangeGroup group(target(), c), late(target(), c);
  group.forward();
  const auto errors = late.run([&](int r) {
    if (r == 2) std::this_thread::sleep_for(std::chrono::milliseconds(100));
    late.forward(r);
  });
  EXPECT_THAT(errors, Each(""));
  EXPECT_EQ(bitwise_difference(late.result().out, group.result().out), "");
}

TEST_P(ExchangeFailures, DelaysAfterWaitsChangeNoBit) {
  if (on_gpu()) GTEST_SKIP() << "the kernels' delays are SONICMOE_CUDA_STRESS";
  const ExchangeCase c = case_of(target(), 8, 60.0);
  ExchangeGroup group(target(), c), delayed(target(), c);
  group.forward();
  group.backward();
  const Pause pause([](int rank) {
    static std::atomic<std::uint64_t> count{0};
    Random random({static_cast<std::uint64_t>(rank), ++count});
    std::this_thread::sleep_for(std::chrono::microseconds(random.integer(0, 2000)));
  });
  // Without a join between the calls: ranks run as far ahead of each other as the flags let them.
  const auto errors = delayed.run([&](int r) {
    for (int i = 0; i < 15; ++i) {
      delayed.forward(r);
      delayed.backward(r);
    }
  });
  EXPECT_THAT(errors, Each(""));
  EXPECT_EQ(bitwise_difference(delayed.result(), group.result()), "");
}

}  // namespace
}  // namespace sonicmoe::rig
