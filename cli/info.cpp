// sonicmoe info: version, backends with the reason why one is off, devices.
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "cli/command.hpp"
#include "cli/options.hpp"
#include "cli/table.hpp"
#include "sonicmoe/backend.hpp"
#include "sonicmoe/version.hpp"

namespace sonicmoe::cli {
namespace {

void print_json() {
  nlohmann::ordered_json root;
  root["version"] = version();
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
  CLI::App* command = app.add_subcommand("info", "Version, backends (and why one is off), devices");
  auto json = std::make_shared<bool>(false);
  add_flag(*command, "--json", *json, "Print JSON");
  command->callback([&action, json] {
    action = [json] {
      *json ? print_json() : print_text();
      return kSuccess;
    };
  });
}

}  // namespace sonicmoe::cli
