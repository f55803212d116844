#include "fuzz/arguments.hpp"

#include <csignal>
#include <exception>
#include <iostream>
#include <optional>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#include <unistd.h>

#include "rig/operations.hpp"
#include "rig/random.hpp"
#include "rig/trial.hpp"

namespace sonicmoe::rig {
namespace {

// Neighbouring numbers attack one call, which costs more to make than to attack.
constexpr std::uint64_t kAttacksPerCall = 16;

Trial make_trial(std::uint64_t number) {
  Random random(number);
  const Target& target = random.pick(targets());
  const Operation& operation = random.pick(all_operations());
  const auto optionals = static_cast<Optionals>(random.integer(0, 2));
  return Trial(operation.make(target, random.bits(), optionals));
}

Attack pick_attack(const Trial& trial, std::uint64_t number) {
  Random random(number ^ 0x5DEECE66Du);
  return random.pick(attacks_on(trial.call()));
}

// The line that repeats the attack in progress, for when it ends the process.
std::string& current_line() {
  static std::string line;
  return line;
}

void print_current_line() {
  (void)!::write(STDOUT_FILENO, current_line().data(), current_line().size());
}

extern "C" void on_signal(int signal) {
  print_current_line();
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

void print_when_killed() {
#if defined(__SANITIZE_ADDRESS__)
  __asan_set_death_callback(print_current_line);
#else
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) {
    std::signal(signal, on_signal);
  }
#endif
}

}  // namespace

int fuzz_arguments(std::uint64_t first, std::uint64_t count) {
  print_when_killed();
  std::uint64_t failed = 0;
  std::optional<Trial> trial;
  for (std::uint64_t number = first; number < first + count; ++number) {
    std::string& line = current_line();
    line = "FAIL sonicmoe_fuzz --attack " + std::to_string(number) + '\n';
    std::string problem;
    try {
      if (!trial || number % kAttacksPerCall == 0)
        trial.emplace(make_trial(number / kAttacksPerCall));
      const Attack attack = pick_attack(*trial, number);
      line.insert(line.size() - 1, "  [" + trial->call().target->backend + "] " +
                                       trial->call().operation + ": " +
                                       describe(trial->call(), attack));
      problem = trial->problem().empty() ? trial->attempt(attack) : trial->problem();
    } catch (const std::exception& error) {
      problem = std::string("exception: ") + error.what();
      trial.reset();
    }
    if (problem.empty()) continue;
    ++failed;
    std::cout << line << "     " << problem << std::endl;
  }
  current_line().clear();
  std::cout << count - failed << " passed, " << failed << " failed" << std::endl;
  return failed == 0 && count > 0 ? 0 : 1;
}

}  // namespace sonicmoe::rig
