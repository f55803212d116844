// sonicmoe completion: scripts for shells. They ask `sonicmoe complete WORD...` for candidates, so
// that they know what this build of the command knows.
#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cli/command.hpp"
#include "cli/options.hpp"
#include "completions.hpp"

namespace sonicmoe::cli {
namespace {

// By shell.
const std::map<std::string, const char*>& scripts() {
  static const std::map<std::string, const char*> all = {
      {"bash", kBashCompletion}, {"fish", kFishCompletion}, {"zsh", kZshCompletion}};
  return all;
}

// "{a,b}|BYTES" has the values a and b.
std::vector<std::string> values_of(const CLI::Option& option) {
  const std::string type = option.get_type_name();
  const std::size_t begin = type.find('{'), end = type.find('}');
  if (begin == std::string::npos || end == std::string::npos) return {};
  return split_list(std::string_view(type).substr(begin + 1, end - begin - 1));
}

std::vector<std::string> candidates(const CLI::App& app, const std::vector<std::string>& words) {
  const CLI::App* command = &app;
  const auto commands = app.get_subcommands([](const CLI::App*) { return true; });
  for (const CLI::App* sub : commands) {
    if (words.size() > 1 && sub->get_name() == words.front()) command = sub;
  }
  const CLI::Option* before =
      words.size() > 1 ? command->get_option_no_throw(words[words.size() - 2]) : nullptr;
  if (before != nullptr && !before->get_positional() && before->get_items_expected_max() > 0) {
    return values_of(*before);
  }
  std::vector<std::string> found;
  if (command == &app) {
    for (const CLI::App* sub : commands) found.push_back(sub->get_name());
  }
  for (const CLI::Option* option : command->get_options()) {
    const std::vector<std::string> values = values_of(*option);
    if (option->get_positional()) found.insert(found.end(), values.begin(), values.end());
    for (const std::string& name : option->get_lnames()) found.push_back("--" + name);
  }
  return found;
}

}  // namespace

void print_candidates(const CLI::App& app, std::vector<std::string> words) {
  // Bash takes --option=value for three words.
  if (!words.empty() && words.back() == "=") words.back() = "";
  std::erase(words, "=");
  for (const std::string& word : candidates(app, words)) {
    if (words.empty() || word.starts_with(words.back())) std::printf("%s\n", word.c_str());
  }
}

void add_completion(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("completion", "Print the completion script of a shell");
  std::vector<std::string> shells;
  for (const auto& [name, script] : scripts()) shells.push_back(name);
  auto shell = std::make_shared<std::string>();
  add_option(*command, "SHELL", *shell, one_of(shells), "The shell that runs the script");
  command->get_option("SHELL")->required();
  add_examples(*command, {"source <(sonicmoe completion bash)",
                          "sonicmoe completion zsh > ~/.zfunc/_sonicmoe",
                          "sonicmoe completion fish > ~/.config/fish/completions/sonicmoe.fish"});
  command->callback([&action, shell] {
    action = [shell] { return std::fputs(scripts().at(*shell), stdout), kSuccess; };
  });
}

}  // namespace sonicmoe::cli
