// sonicmoe: the library from the command line. Every subcommand lives in a file of its own.
#include <cstdio>
#include <exception>
#include <new>
#include <string>

#include "cli/command.hpp"
#include "sonicmoe/error.hpp"
#include "sonicmoe/version.hpp"

namespace {

using namespace sonicmoe::cli;

// Errors are one line, whatever the message was made of.
int report(std::string message, int status) {
  while (!message.empty() && message.back() == '\n') message.pop_back();
  for (char& c : message) {
    if (c == '\n') c = ' ';
  }
  const char* prefix = message.starts_with("sonicmoe: ") ? "" : "sonicmoe: ";
  std::fprintf(stderr, "%s%s\n", prefix, message.c_str());
  return status;
}

// CLI11 would call an unknown subcommand an unexpected argument; say what is known instead.
std::string unknown_subcommand(const CLI::App& app, int argc, char** argv) {
  if (argc < 2 || argv[1][0] == '-') return {};
  std::string known;
  for (const CLI::App* sub : app.get_subcommands([](const CLI::App*) { return true; })) {
    if (sub->get_name() == argv[1]) return {};
    known += (known.empty() ? "" : ", ") + sub->get_name();
  }
  return "unknown subcommand \"" + std::string(argv[1]) + "\", expected one of " + known;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Mixture-of-Experts layers (SonicMoE): inspect, check and time the library.",
               "sonicmoe"};
  app.set_version_flag("--version", "sonicmoe " + std::string(sonicmoe::version()));
  app.require_subcommand(1);
  app.get_formatter()->column_width(34);
  Action action;
  add_info(app, action);
  add_check(app, action);
  add_bench(app, action);
  add_memory(app, action);
  add_route(app, action);

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == static_cast<int>(CLI::ExitCodes::Success)) return app.exit(error);
    const std::string unknown = unknown_subcommand(app, argc, argv);
    return report(unknown.empty() ? error.what() : unknown, kUsage);
  }

  try {
    return action();
  } catch (const sonicmoe::Error& error) {
    return report(error.what(), kUsage);
  } catch (const std::bad_alloc&) {
    return report("not enough memory for this request", kFailure);
  } catch (const std::exception& error) {
    return report(error.what(), kFailure);
  }
}
