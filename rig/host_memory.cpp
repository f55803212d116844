#include "rig/host_memory.hpp"

#include <algorithm>
#include <fstream>
#include <limits>
#include <string>

#include "sonicmoe/backend.hpp"

#if defined(__unix__)
#include <sys/resource.h>
#include <unistd.h>
#endif

namespace sonicmoe::rig {
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

std::size_t usable_memory(Device device) {
  if (device.type == DeviceType::kCpu) return usable_host_memory();
  for (const DeviceInfo& info : devices()) {
    if (info.device.type == device.type && info.device.index == device.index) {
      return info.memory_bytes;
    }
  }
  return 0;
}

}  // namespace sonicmoe::rig
