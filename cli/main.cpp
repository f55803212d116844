// sonicmoe: the library from the command line. Every subcommand lives in a file of its own.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <new>
#include <sstream>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "cli/command.hpp"
#include "cli/options.hpp"
#include "cli/output.hpp"
#include "sonicmoe/error.hpp"
#include "sonicmoe/version.hpp"

namespace {

using namespace sonicmoe::cli;

std::vector<std::string> subcommand_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* sub : app.get_subcommands([](const CLI::App*) { return true; })) {
    names.push_back(sub->get_name());
  }
  return names;
}

// A help text with its headings, which are the lines that are not indented and have a colon, in
// bold.
void print_help(std::FILE* stream, const std::string& text) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const std::size_t end = line.find(':') + 1;
    const bool heading = end > 0 && (end == line.size() || line.starts_with("Usage:"));
    if (heading) line = styled(stream, kBold, line.substr(0, end)) + line.substr(end);
    std::fprintf(stream, "%s\n", line.c_str());
  }
}

// A value given to a flag or missing behind an option, or empty.
std::string explain_value(const CLI::App& command, const std::vector<std::string>& words) {
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::string name = words[i].substr(0, words[i].find('='));
    const CLI::Option* option = command.get_option_no_throw(name);
    if (option == nullptr || !name.starts_with("-")) continue;
    const bool last = i + 1 == words.size();
    if (option->get_items_expected_max() == 0) {
      if (name.size() < words[i].size() || (!last && words[i + 1].empty())) {
        return name + ": expected no value, got \"" + words[i].substr(name.size()).erase(0, 1) +
               "\"";
      }
    } else if (name == words[i]) {
      if (last) return name + ": expected a value, got none";
      ++i;
    }
  }
  return {};
}

// CLI11 calls an unknown subcommand or option an unexpected argument, or misses a subcommand; say
// what was not understood and what would be.
std::string explain(const CLI::App& app, const std::vector<std::string>& words,
                    const CLI::ParseError& error) {
  const auto used = app.get_subcommands();
  if (used.empty()) {
    const std::string expected =
        "expected one of " + join(subcommand_names(app), ", ") + "; sonicmoe --help explains them";
    const bool option = words.front().starts_with("-");
    return std::string("unknown ") + (option ? "option" : "subcommand") + " \"" + words.front() +
           "\", " + expected;
  }
  const std::string name = used.front()->get_name();
  const std::string advice = "; sonicmoe " + name + " --help lists what it takes";
  if (const std::vector<std::string> early = app.remaining(); !early.empty()) {
    return "unknown option \"" + early.front() + "\" before \"" + name + "\"" + advice;
  }
  if (const std::string value = explain_value(*used.front(), words); !value.empty()) return value;
  const std::vector<std::string> unknown = used.front()->remaining();
  if (unknown.empty()) return error.what() + advice;
  const auto option = std::find_if(unknown.begin(), unknown.end(),
                                   [](const std::string& word) { return word.starts_with("-"); });
  if (option != unknown.end()) return name + ": unknown option \"" + *option + "\"" + advice;
  return name + ": unexpected argument \"" + unknown.front() + "\"" + advice;
}

// The words of the command line. CLI11 would take the next word for the value of "--name=", which a
// shell makes of --name=$UNSET.
std::vector<std::string> words_of(int argc, char** argv) {
  std::vector<std::string> words;
  for (int i = 1; i < argc; ++i) {
    std::string word = argv[i];
    const bool empty_value = word.starts_with("--") && word.find('=') + 1 == word.size();
    if (empty_value) word.pop_back();
    words.push_back(std::move(word));
    if (empty_value) words.emplace_back();
  }
  return words;
}

int parse_and_run(int argc, char** argv) {
  CLI::App app{"Mixture-of-Experts layers (SonicMoE): inspect, check and time the library.",
               "sonicmoe"};
  app.set_version_flag("-V,--version", "sonicmoe " + std::string(sonicmoe::version()));
  app.require_subcommand(1);
  app.get_formatter()->column_width(34);
  Action action;
  add_info(app, action);
  add_check(app, action);
  add_bench(app, action);
  add_memory(app, action);
  add_route(app, action);
  add_completion(app, action);
  add_man(app, action);
  add_examples(app, {"sonicmoe info", "sonicmoe memory --gpu h100",
                     "sonicmoe bench --shape 2k,256,128,16,4"});

  if (argc < 2) return print_help(stderr, app.help()), kUsage;
  if (std::string_view(argv[1]) == "complete") {
    return print_candidates(app, {argv + 2, argv + argc}), kSuccess;
  }
  const std::vector<std::string> words = words_of(argc, argv);
  try {
    app.parse(std::vector<std::string>(words.rbegin(), words.rend()));
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == static_cast<int>(CLI::ExitCodes::Success)) {  // --help, --version
      std::ostringstream text;
      app.exit(error, text);
      print_help(stdout, text.str());
      return kSuccess;
    }
    report(explain(app, words, error));
    return kUsage;
  }
  return action();
}

}  // namespace

int main(int argc, char** argv) {
  prepare_streams();
  int status = kFailure;
  try {
    status = parse_and_run(argc, argv);
  } catch (const sonicmoe::Error& error) {
    report(error.what());
    status = kUsage;
  } catch (const std::bad_alloc&) {  // nothing here may allocate
    std::fputs("sonicmoe: not enough memory for this request\n", stderr);
  } catch (const std::exception& error) {
    report(error.what());
  }
  return finish_output(status);
}
