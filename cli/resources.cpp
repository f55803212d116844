#include "cli/resources.hpp"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <latch>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "sonicmoe/backend.hpp"

#if defined(__unix__)
#include <sys/resource.h>
#include <unistd.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace sonicmoe::cli {
namespace {

constexpr std::size_t kUnknown = std::numeric_limits<std::size_t>::max();

std::size_t installed_memory() {
#if defined(__unix__)
  const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGE_SIZE);
  if (pages > 0 && page > 0) {
    return static_cast<std::size_t>(pages) * static_cast<std::size_t>(page);
  }
#endif
  return kUnknown;
}

// What the other processes leave, on Linux.
std::size_t available_memory() {
  std::ifstream file("/proc/meminfo");
  for (std::string name, rest; file >> name; std::getline(file, rest)) {
    if (std::size_t kibibytes = 0; name == "MemAvailable:" && file >> kibibytes) {
      return kibibytes * 1024;
    }
  }
  return kUnknown;
}

std::size_t address_space_limit() {
#if defined(__unix__)
  rlimit limit{};
  if (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) {
    return static_cast<std::size_t>(limit.rlim_cur);
  }
#endif
  return kUnknown;
}

// Of control groups 2 and 1, as a container shows them. "max", or no such file: none.
std::size_t container_limit() {
  std::size_t least = kUnknown;
  for (const char* path :
       {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    std::ifstream file(path);
    if (std::size_t bytes = 0; file >> bytes) least = std::min(least, bytes);
  }
  return least;
}

}  // namespace

std::size_t usable_host_memory() {
  const std::size_t bytes =
      std::min({installed_memory(), available_memory(), address_space_limit(), container_limit()});
  return bytes == kUnknown ? 0 : bytes;
}

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
  std::vector<std::thread> team;
  const auto join = [&] {
    all_started.count_down();
    for (std::thread& member : team) member.join();
  };
  try {
    team.reserve(static_cast<std::size_t>(count));
    while (static_cast<int>(team.size()) + 1 < count) {  // the caller is one of them
      team.emplace_back([&] { all_started.wait(); });
    }
    require_headroom();  // beside their stacks
  } catch (const std::bad_alloc&) {
    join();
    throw;
  } catch (const std::system_error& error) {
    const std::string started = std::to_string(team.size() + 1);
    join();
    throw std::runtime_error("cannot start " + std::to_string(count) + " threads, only " + started +
                             " (" + error.code().message() + "); --threads asks for fewer");
  }
  join();
}

std::size_t memory_bytes_of(Device device) {
  if (on_host(device)) return usable_host_memory();
  for (const DeviceInfo& info : devices()) {
    if (info.device.type == device.type && info.device.index == device.index) {
      return info.memory_bytes;
    }
  }
  return 0;
}

}  // namespace sonicmoe::cli
