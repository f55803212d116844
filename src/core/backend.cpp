#include "core/backend.hpp"

#include <cstdio>
#include <cstdlib>
#include <utility>

#if defined(__unix__)
#include <unistd.h>
#endif

#include "core/backend_table.hpp"
#include "core/log.hpp"
#include "sonicmoe/backend.hpp"
#include "sonicmoe/error.hpp"

namespace sonicmoe {
namespace {

std::vector<std::unique_ptr<Backend>> make_backends() {
  std::vector<std::unique_ptr<Backend>> list;
  for (const BackendEntry& entry : backend_table()) {
    if (entry.make != nullptr) list.push_back(entry.make());
  }
  return list;
}

// Why `backend` cannot take the call, or empty.
std::string reason_against(const Backend& backend, const Context& context,
                           std::string_view wanted) {
  if (!wanted.empty() && backend.name() != wanted) {
    return "not the requested backend \"" + std::string(wanted) + "\"";
  }
  if (!backend.serves(context.device.type)) return "does not serve " + to_string(context.device);
  return backend.unavailable_reason();
}

// Who asked for no backend and got the reference should know why it is slow.
void warn_of_reference(const Backend& backend, std::string_view wanted) {
  if (!wanted.empty() || backend.name() != "reference") return;
  static const bool warned = [] {
    std::fputs(
        "sonicmoe: warning: this build has no oneDNN: the CPU computes with the reference backend, "
        "some 40 times slower (SONICMOE_BACKEND=reference silences this)\n",
        stderr);
    return true;
  }();
  (void)warned;
}

[[noreturn]] void fail_wanted(const Context& context, std::string_view operation,
                              const char* argument, std::string_view wanted) {
  std::string usable, why = "not in this build";
  for (const auto& backend : backend_list()) {
    const std::string against = reason_against(*backend, context, {});
    if (backend->name() == wanted) why = against;
    if (against.empty()) usable += (usable.empty() ? "" : " or ") + std::string(backend->name());
  }
  throw Error(std::string(operation), argument,
              (usable.empty() ? "a backend" : usable) + " for " + to_string(context.device),
              std::string("\"").append(wanted).append("\", ").append(why));
}

std::size_t host_memory_bytes() {
#if defined(__unix__)
  const long pages = sysconf(_SC_PHYS_PAGES);
  const long page = sysconf(_SC_PAGE_SIZE);
  if (pages > 0 && page > 0)
    return static_cast<std::size_t>(pages) * static_cast<std::size_t>(page);
#endif
  return 0;
}

}  // namespace

std::span<const std::unique_ptr<Backend>> backend_list() {
  // Never destroyed: at exit, calls may still run on other threads.
  static const auto& list = *new std::vector<std::unique_ptr<Backend>>(make_backends());
  return list;
}

const Backend& choose_backend(const Context& context, std::string_view operation) {
  std::string_view wanted = context.backend;
  const char* argument = "backend";
  if (const char* forced = std::getenv("SONICMOE_BACKEND"); wanted.empty() && forced != nullptr) {
    wanted = forced;
    argument = "SONICMOE_BACKEND";
  }
  std::string reasons;
  for (const auto& backend : backend_list()) {
    const std::string against = reason_against(*backend, context, wanted);
    if (against.empty()) {
      warn_of_reference(*backend, wanted);
      log_choice({}, [&] {  // a description may ask the device: not on every call
        return std::string(backend->name()) + " (" + backend->description() + ")" +
               (reasons.empty() ? "" : "; passed over: " + reasons);
      });
      return *backend;
    }
    reasons += (reasons.empty() ? "" : "; ") + std::string(backend->name()) + ": " + against;
  }
  if (!wanted.empty()) fail_wanted(context, operation, argument, wanted);
  for (const BackendEntry& entry : backend_table()) {
    if (entry.make != nullptr) continue;
    std::string reason(entry.name);
    reason.append(": ").append(entry.absent).append(reasons.empty() ? "" : "; ").append(reasons);
    reasons = std::move(reason);
  }
  throw Error(std::string(operation), "device", "one that a backend serves",
              to_string(context.device) + " (" + reasons + ")");
}

std::vector<BackendInfo> backends() {
  std::vector<BackendInfo> list;
  auto built = backend_list().begin();
  for (const BackendEntry& entry : backend_table()) {
    if (entry.make == nullptr) {
      list.push_back({std::string(entry.name), false, std::string(entry.absent)});
      continue;
    }
    const Backend& backend = **built++;
    const std::string against = backend.unavailable_reason();
    list.push_back({std::string(entry.name), against.empty(),
                    against.empty() ? backend.description() : against});
  }
  return list;
}

std::vector<DeviceInfo> devices() {
  std::vector<DeviceInfo> list = {{Device{}, "CPU", host_memory_bytes()}};
  for (const auto& backend : backend_list()) {
    for (const DeviceInfo& device : backend->devices()) list.push_back(device);
  }
  return list;
}

}  // namespace sonicmoe
