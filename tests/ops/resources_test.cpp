// Resources that run out: memory at each allocation of an operation, threads, address space. The
// outcome is an Error or the same bits, never the end of the process.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <string>
#include <thread>

#include "core/parallel.hpp"
#include "rig/moe_case.hpp"
#include "rig/operations.hpp"
#include "sonicmoe/sonicmoe.hpp"

namespace {

// Counts down with every allocation of the process; the one that reaches 0 fails.
std::atomic<long> allocations_left{-1};

void* allocate(std::size_t bytes, std::size_t alignment) noexcept {
  if (allocations_left.load(std::memory_order_relaxed) >= 0 && allocations_left.fetch_sub(1) == 0) {
    return nullptr;
  }
  if (alignment == 0) return std::malloc(bytes == 0 ? 1 : bytes);
  return std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
}

void* allocate_or_throw(std::size_t bytes, std::size_t alignment) {
  void* const data = allocate(bytes, alignment);
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

}  // namespace

// For the whole binary.
void* operator new(std::size_t bytes) { return allocate_or_throw(bytes, 0); }
void* operator new[](std::size_t bytes) { return allocate_or_throw(bytes, 0); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return allocate_or_throw(bytes, static_cast<std::size_t>(alignment));
}
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept { return allocate(bytes, 0); }
void* operator new[](std::size_t bytes, const std::nothrow_t&) noexcept {
  return allocate(bytes, 0);
}
void operator delete(void* data) noexcept { std::free(data); }
void operator delete[](void* data) noexcept { std::free(data); }
void operator delete(void* data, std::size_t) noexcept { std::free(data); }
void operator delete[](void* data, std::size_t) noexcept { std::free(data); }
void operator delete(void* data, std::align_val_t) noexcept { std::free(data); }
void operator delete(void* data, std::size_t, std::align_val_t) noexcept { std::free(data); }
void operator delete(void* data, const std::nothrow_t&) noexcept { std::free(data); }
void operator delete[](void* data, const std::nothrow_t&) noexcept { std::free(data); }

namespace sonicmoe::rig {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kLimitsCanBeSet = false;  // shadow memory takes terabytes of address space
#else
constexpr bool kLimitsCanBeSet = true;
#endif

std::vector<Target> host_targets() {
  std::vector<Target> list;
  for (const Target& target : targets()) {
    if (target.device.type == DeviceType::kCpu) list.push_back(target);
  }
  return list;
}

class Resources : public ::testing::TestWithParam<Target> {};

INSTANTIATE_TEST_SUITE_P(Backends, Resources, ::testing::ValuesIn(host_targets()),
                         [](const auto& test) { return test.param.backend; });

// The n-th allocation fails, for every n that an operation gets to.
TEST_P(Resources, EveryAllocationMayFail) {
  for (const Operation& operation : all_operations()) {
    Call call = operation.make(GetParam(), 61, Optionals::kAll);
    ASSERT_FALSE(call.run().refused);  // also warms up what is kept between calls
    const Elements expected = call.results();
    call.restore_memory(/*scratch_too=*/false);
    int failures = 0;
    for (long n = 0;; ++n) {
      ASSERT_LT(n, 2000) << call.operation;
      allocations_left = n;
      Outcome outcome;
      std::string other;
      try {
        outcome = call.run();
      } catch (const std::exception& error) {
        other = error.what();
      }
      const bool failed = allocations_left.exchange(-1) < 0;
      EXPECT_EQ(other, "") << call.operation << ", allocation " << n;
      if (!outcome.refused) {  // none was left, or it was one that can be done without
        EXPECT_EQ(difference(call, call.results(), expected), "") << call.operation;
      } else {
        EXPECT_NE(outcome.message.find("out of memory"), std::string::npos) << outcome.message;
        ++failures;
      }
      call.restore_memory(/*scratch_too=*/false);
      if (!failed) break;
    }
    EXPECT_GT(failures, 0) << call.operation;
    ASSERT_FALSE(call.run().refused) << call.operation;
    EXPECT_EQ(difference(call, call.results(), expected), "") << call.operation;
  }
}

// ------------------------------------------------------------------------- limits of the process

// Exit code of body() in a process of its own; 128 + the signal that ended it. On a thread of its
// own too: OpenMP's threads of this one are not there after a fork.
template <class Body>
int in_a_process(Body body) {
  const pid_t pid = fork();
  if (pid == 0) {
    int code = 0;
    std::thread([&] { code = body(); }).join();
    _exit(code);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

std::size_t address_space_in_use() {
  std::size_t pages = 0;
  if (std::FILE* file = std::fopen("/proc/self/statm", "r")) {
    if (std::fscanf(file, "%zu", &pages) != 1) pages = 0;
    std::fclose(file);
  }
  return pages * static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
}

bool leave(std::size_t bytes) {
  const rlim_t limit = address_space_in_use() + bytes;
  const rlimit limits{limit, RLIM_INFINITY};
  return setrlimit(RLIMIT_AS, &limits) == 0;
}

constexpr std::size_t kMegabyte = std::size_t{1} << 20;

// A forward and backward call for 16 threads, its memory taken before there is a limit.
struct ManyRows {
  explicit ManyRows(const Target& target_)
      : target(target_),
        inputs(target,
               [] {
                 MoECase c;
                 c.num_tokens = 300;
                 c.num_experts = 12;
                 return c;
               }()),
        out(target, DType::kFloat32, {300, 24}),
        grad_x(target, DType::kFloat32, {300, 24}),
        grad_w1(target, DType::kFloat32, {12, 40, 24}),
        h(target, DType::kFloat32, {600, 40}),
        metadata(target, moe_metadata_bytes(inputs.shape())),
        workspace(target,
                  std::max(moe_forward_workspace(target.context(16), inputs.shape()).bytes,
                           moe_backward_workspace(target.context(16), inputs.shape()).bytes)) {}
  std::vector<std::vector<double>> results() const {
    return {out.values(), grad_x.values(), grad_w1.values()};
  }
  void run(int num_threads) const {
    const Context context = target.context(num_threads);
    MoEForwardArgs forward;
    forward.options = inputs.description.options();
    forward.x = inputs.x.view();
    forward.weights = inputs.weights();
    forward.routing = inputs.routing();
    forward.out = out.view();
    forward.h = h.view();
    forward.metadata = metadata.view();
    forward.workspace = workspace.view();
    moe_forward(context, forward);
    MoEBackwardArgs backward;
    backward.options = forward.options;
    backward.grad_out = inputs.grad_out.view();
    backward.x = forward.x;
    backward.weights = forward.weights;
    backward.routing = forward.routing;
    backward.h = h.view();
    backward.metadata = metadata.view();
    backward.grad_x = grad_x.view();
    backward.grad_w1 = grad_w1.view();
    backward.workspace = workspace.view();
    moe_backward(context, backward);
  }

  const Target& target;
  MoEInputs inputs;
  Tensor out, grad_x, grad_w1, h;
  GuardedBuffer metadata, workspace;
};

TEST_P(Resources, ThreadsThatCannotStart) {
  if (!kLimitsCanBeSet) GTEST_SKIP() << "no limits under a sanitizer";
  const ManyRows call(GetParam());
  call.run(1);
  const auto expected = call.results();
  int computed = 0, tried = 0;
  for (std::size_t room = 0; room <= 140; room += 7) {  // of up to 15 stacks, 8 MB by default
    const int code = in_a_process([&] {
      if (!leave(room * kMegabyte)) return 2;
      try {
        call.run(16);
      } catch (const Error&) {
        return 3;
      }
      return call.results() == expected ? 0 : 1;
    });
    EXPECT_TRUE(code == 0 || code == 3) << code << " with " << room << " MB";
    computed += code == 0;
    ++tried;
  }
  EXPECT_GE(computed, tried / 2);
}

TEST_P(Resources, NoAddressSpaceForScratch) {
  if (!kLimitsCanBeSet) GTEST_SKIP() << "no limits under a sanitizer";
  const int code = in_a_process([&] {
    // route_forward's own scratch, several times [E], does not fit.
    constexpr std::int64_t kExperts = std::int64_t{1} << 25;
    void* const logits = std::calloc(kExperts, sizeof(float));
    if (logits == nullptr) return 5;
    std::vector<float> weights(1);
    std::vector<std::int32_t> ids(1);
    RouteForwardArgs args;
    args.options.scoring = Scoring::kSigmoidTopK;
    args.logits = ConstTensorView(logits, DType::kFloat32, {1, kExperts});
    args.topk_ids = TensorView(ids.data(), DType::kInt32, {1, 1});
    args.topk_weights = TensorView(weights.data(), DType::kFloat32, {1, 1});
    if (!leave(kMegabyte)) return 2;
    try {
      route_forward(GetParam().context(1), args);
    } catch (const OutOfMemory& error) {
      return std::string(error.what()) == "route_forward: out of memory" ? 0 : 3;
    }
    return 4;
  });
  EXPECT_EQ(code, 0);
}

// What parallel_for promises by itself: every task runs once, however many threads there are.
TEST(ParallelFor, EveryTaskRunsOnceWithoutThreads) {
  if (!kLimitsCanBeSet) GTEST_SKIP() << "no limits under a sanitizer";
  const int code = in_a_process([] {
    std::vector<int> runs(1000, 0);
    if (!leave(kMegabyte)) return 2;
    for (const int threads : {64, 3, 1000}) {
      parallel_for(threads, 1000,
                   [&](std::int64_t i, int) { ++runs[static_cast<std::size_t>(i)]; });
    }
    return runs == std::vector<int>(1000, 3) ? 0 : 1;
  });
  EXPECT_EQ(code, 0);
}

}  // namespace
}  // namespace sonicmoe::rig
