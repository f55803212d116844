// sonicmoe info: what an issue report needs. Version, build, backends with the reason why one is
// off, devices.
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "cli/command.hpp"
#include "cli/options.hpp"
#include "cli/resources.hpp"
#include "cli/table.hpp"
#include "commit.hpp"
#include "sonicmoe/backend.hpp"
#include "sonicmoe/version.hpp"

#if defined(__unix__)
#include <dlfcn.h>
#include <sys/utsname.h>
#endif

namespace sonicmoe::cli {
namespace {

// The file of the runtime that this process has loaded, which need not be the compiler's.
std::string openmp_runtime() {
#if !defined(_OPENMP)
  return "none (std::thread)";
#elif defined(__unix__)
  Dl_info library{};
  void* function = dlsym(RTLD_DEFAULT, "omp_get_max_threads");
  if (function != nullptr && dladdr(function, &library) != 0) return library.dli_fname;
#endif
  return "unknown";
}

std::string system_name() {
#if defined(__unix__)
  if (utsname name{}; uname(&name) == 0) {
    return std::string(name.sysname) + " " + name.release + " " + name.machine;
  }
#endif
  return "unknown";
}

// What this build is made of and what it runs on.
std::vector<std::pair<std::string, std::string>> build_facts() {
  return {{"commit", kCommit},
          {"build type", SONICMOE_BUILD_TYPE},
          {"compiler", SONICMOE_COMPILER},
          {"CUDA architectures", SONICMOE_CUDA_ARCHITECTURES},
          {"OpenMP runtime", openmp_runtime()},
          {"threads", std::to_string(default_threads())},
          {"system", system_name()}};
}

void print_json() {
  nlohmann::ordered_json root;
  root["version"] = version();
  for (const auto& [name, value] : build_facts()) root["build"][name] = value;
  root["backends"] = nlohmann::ordered_json::array();
  for (const BackendInfo& backend : backends()) {
    root["backends"].push_back(
        {{"name", backend.name}, {"available", backend.available}, {"reason", backend.reason}});
  }
  root["devices"] = nlohmann::ordered_json::array();
  for (const DeviceInfo& device : devices()) {
    root["devices"].push_back({{"device", to_string(device.device)},
                               {"name", device.name},
                               {"memory_bytes", device.memory_bytes}});
  }
  std::printf("%s\n", root.dump(2).c_str());
}

void print_text() {
  std::printf("sonicmoe %s\n\n", std::string(version()).c_str());
  for (const auto& [name, value] : build_facts()) {
    std::printf("%-18s  %s\n", name.c_str(), value.c_str());
  }
  std::printf("\n");
  Table backend_table({"backend", "state", "what it runs on, or why it is off"}, 3);
  for (const BackendInfo& backend : backends()) {
    backend_table.add_row({backend.name, backend.available ? "on" : "off", backend.reason});
  }
  backend_table.print();
  std::printf("\n");
  Table device_table({"device", "name", "memory"}, 2);
  for (const DeviceInfo& device : devices()) {
    device_table.add_row({to_string(device.device), device.name,
                          format_bytes(static_cast<double>(device.memory_bytes))});
  }
  device_table.print();
}

}  // namespace

void add_info(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand(
      "info", "Version, build, backends (and why one is off), devices: what an issue report needs");
  auto json = std::make_shared<bool>(false);
  add_flag(*command, "--json", *json, "Print JSON");
  add_examples(*command, {"sonicmoe info", "sonicmoe info --json"});
  command->callback([&action, json] {
    action = [json] {
      *json ? print_json() : print_text();
      return kSuccess;
    };
  });
}

}  // namespace sonicmoe::cli
