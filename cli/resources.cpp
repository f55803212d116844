#include "cli/resources.hpp"

#include <algorithm>
#include <cstdlib>
#include <latch>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace sonicmoe::cli {

void require_headroom() {
  constexpr std::size_t kHeadroom = std::size_t{64} << 20;
  static void* volatile block;  // an allocation that nobody looks at may be optimised away
  block = std::malloc(kHeadroom);
  if (block == nullptr) throw std::bad_alloc();
  std::free(block);
}

int default_threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
#endif
}

void require_threads(int count) {
  std::latch all_started(1);
  std::vector<std::jthread> team;  // joined at the end
  struct Release {
    std::latch& latch;
    ~Release() { latch.count_down(); }
  } release{all_started};
  try {
    team.reserve(static_cast<std::size_t>(count));
    while (static_cast<int>(team.size()) + 1 < count) {  // the caller is one of them
      team.emplace_back([&] { all_started.wait(); });
    }
    require_headroom();  // beside their stacks
  } catch (const std::system_error& error) {
    throw std::runtime_error("cannot start " + std::to_string(count) + " threads, only " +
                             std::to_string(team.size() + 1) + " (" + error.code().message() +
                             "); --threads asks for fewer");
  }
}

}  // namespace sonicmoe::cli
