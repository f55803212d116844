#include "core/parallel.hpp"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(_OPENMP) && !defined(SONICMOE_STD_THREADS)
#include <omp.h>
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

#if defined(_OPENMP) && !defined(SONICMOE_STD_THREADS)
// OpenMP ends the process where the system refuses a thread. So whoever asks for a larger team than
// before has the threads tried first, all alive at once, and takes as many as there were.
int startable(int threads) {
  thread_local int proven = 1;  // each thread of the caller has a team of its own
  if (threads <= proven) return threads;
  std::mutex gate;
  std::unique_lock hold(gate);
  std::vector<std::thread> tried =
      start_threads(threads - 1, [&gate](int) { const std::lock_guard wait(gate); });
  hold.unlock();
  for (std::thread& thread : tried) thread.join();
  return proven = static_cast<int>(tried.size()) + 1;
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
  threads = static_cast<int>(std::min<std::int64_t>(threads, count));
  if (threads <= 1) {
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
  std::vector<std::thread> team = start_threads(threads - 1, work);
  work(0);
  for (std::thread& member : team) member.join();
#elif defined(_OPENMP)
  threads = startable(threads);
#pragma omp parallel num_threads(threads)
  work(omp_get_thread_num());
#else
  work(0);
#endif
  error.rethrow();
}

}  // namespace sonicmoe
