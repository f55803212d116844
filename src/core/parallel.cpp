#include "core/parallel.hpp"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#if defined(SONICMOE_STD_THREADS)
#include <system_error>
#include <thread>
#elif defined(_OPENMP)
#include <omp.h>
#include <pthread.h>
#endif

namespace sonicmoe {
namespace {

// Keeps the first exception of a team; exceptions must not cross an OpenMP region's boundary.
class FirstError {
 public:
  void capture() noexcept {
    const std::lock_guard lock(mutex_);
    if (!error_) error_ = std::current_exception();
    failed_.store(true, std::memory_order_relaxed);
  }
  bool failed() const noexcept { return failed_.load(std::memory_order_relaxed); }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::mutex mutex_;
  std::exception_ptr error_;
  std::atomic<bool> failed_{false};
};

#if defined(SONICMOE_STD_THREADS)
// Starts up to `count` threads that run work(1), work(2), ...; fewer where the system has no more.
template <class Work>
std::vector<std::thread> start_threads(int count, const Work& work) {
  std::vector<std::thread> team;
  try {
    team.reserve(static_cast<std::size_t>(std::max(count, 0)));
    for (int t = 1; t <= count; ++t) team.emplace_back(work, t);
  } catch (const std::system_error&) {  // a limit on threads or on memory for their stacks
  } catch (const std::bad_alloc&) {
  }
  return team;
}
#elif defined(_OPENMP)
extern "C" void* wait_at_gate(void* gate) {
  const std::lock_guard wait(*static_cast<std::mutex*>(gate));
  return nullptr;
}

// Threads that the system lets live at the same time, at most `threads`. They must not allocate: a
// heap that one of them gets would be missing when OpenMP starts its own.
int try_threads(int threads) {
  std::vector<pthread_t> tried;
  tried.reserve(static_cast<std::size_t>(threads));
  constexpr std::size_t kBookkeeping = std::size_t{1} << 20;  // of OpenMP's team
  const std::unique_ptr<std::byte[]> bookkeeping(new std::byte[kBookkeeping]);
  std::mutex gate;
  {
    const std::lock_guard hold(gate);
    pthread_t thread;
    while (static_cast<int>(tried.size()) < threads &&
           pthread_create(&thread, nullptr, wait_at_gate, &gate) == 0) {
      tried.push_back(thread);
    }
  }
  for (const pthread_t thread : tried) pthread_join(thread, nullptr);
  return static_cast<int>(tried.size());
}

// The size of the next team: as many as there are tasks, at most `threads`. OpenMP ends the process
// where the system refuses a thread, so new ones are tried first. A team that is large enough stays
// as it is: OpenMP would end the threads that it does not need and make them anew for the next.
int team_size(int threads, std::int64_t tasks) {
  thread_local int kept = 1;  // by OpenMP, for this thread of the caller
  const int wanted =
      std::max(static_cast<int>(std::min<std::int64_t>(threads, tasks)), std::min(threads, kept));
  if (wanted <= kept) return kept = wanted;
  try {
    return kept = try_threads(wanted - 1) + 1;
  } catch (const std::bad_alloc&) {
    return kept = 1;
  }
}
#endif

}  // namespace

int thread_count(int requested) {
  if (requested > 0) return requested;
#if defined(SONICMOE_STD_THREADS)
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
#elif defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

void parallel_for(int threads, std::int64_t count,
                  const std::function<void(std::int64_t, int)>& task) {
  if (threads <= 1 || count <= 1) {
    for (std::int64_t i = 0; i < count; ++i) task(i, 0);
    return;
  }
  FirstError error;
  std::atomic<std::int64_t> next{0};
  const auto work = [&](int thread) {
    try {
      for (std::int64_t i; !error.failed() && (i = next.fetch_add(1)) < count;) task(i, thread);
    } catch (...) {
      error.capture();
    }
  };
#if defined(SONICMOE_STD_THREADS)
  // ThreadSanitizer does not see OpenMP's barriers; this variant runs the same tasks on threads it
  // understands.
  const auto others = static_cast<int>(std::min<std::int64_t>(threads, count)) - 1;
  std::vector<std::thread> team = start_threads(others, work);
  work(0);
  for (std::thread& member : team) member.join();
#elif defined(_OPENMP)
  const int team = team_size(threads, count);
#pragma omp parallel num_threads(team)
  work(omp_get_thread_num());
#else
  work(0);
#endif
  error.rethrow();
}

}  // namespace sonicmoe
