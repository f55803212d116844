// sonicmoe_fuzz --cases N [--seed S] [--seconds T] [--case C]: random cases of every operation
// (rig/checks.hpp, most of them of the experts) on every backend, each compared with the float64
// oracle. --seconds ends the run early; the last line says how many cases were run.
// sonicmoe_fuzz --arguments N [--seed S] [--attack A]: random operations with one argument made
// wrong: refused with its name and nothing changed, or computed right.
// A failure prints one line that repeats it.
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <string>

#include "fuzz/arguments.hpp"
#include "rig/checks.hpp"
#include "rig/random.hpp"

namespace sonicmoe::rig {
namespace {

const CheckOperation& operation_of(std::uint64_t number) {
  constexpr std::int64_t kExperts = 3;  // the first of the list
  Random random(number ^ 0x5DEECE66Du);
  const auto last = static_cast<std::int64_t>(check_operations().size()) - 1;
  const bool experts = random.chance(0.6);
  return check_operations()[static_cast<std::size_t>(
      random.integer(0, experts ? kExperts - 1 : last))];
}

// `seconds` 0: no limit of time.
int fuzz(std::uint64_t first, std::uint64_t count, std::uint64_t seconds) {
  std::uint64_t passed = 0, failed = 0;
  const auto begin = std::chrono::steady_clock::now();
  for (std::uint64_t seed = first; seed < first + count; ++seed) {
    if (seconds > 0 && std::chrono::steady_clock::now() - begin > std::chrono::seconds(seconds)) {
      std::cout << "stopped after " << seconds << " s at " << seed - first << " of " << count
                << " cases\n";
      break;
    }
    bool good = true;
    for (const Target& target : targets()) {
      const Finding finding = run_check(operation_of(seed), target, seed);
      if (finding.problems.empty()) continue;
      good = false;
      std::cout << "FAIL sonicmoe_fuzz --case " << seed << "  [" << target.backend << "] "
                << finding.description << '\n';
      for (const std::string& problem : finding.problems) std::cout << "     " << problem << '\n';
    }
    ++(good ? passed : failed);
  }
  std::cout << passed << " passed, " << failed << " failed" << std::endl;
  return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace
}  // namespace sonicmoe::rig

int main(int argc, char** argv) {
  std::uint64_t cases = 1000, arguments = 0, seed = 1, seconds = 0;
  for (int i = 1; i < argc; i += 2) {
    const std::string flag = argv[i];
    char* end = nullptr;
    const std::uint64_t value = i + 1 < argc ? std::strtoull(argv[i + 1], &end, 10) : 0;
    const bool is_number = i + 1 < argc && end != argv[i + 1] && *end == '\0';
    if (is_number && flag == "--case") return sonicmoe::rig::fuzz(value, 1, 0);
    if (is_number && flag == "--attack") return sonicmoe::rig::fuzz_arguments(value, 1);
    std::uint64_t* const option = flag == "--cases"       ? &cases
                                  : flag == "--arguments" ? &arguments
                                  : flag == "--seed"      ? &seed
                                  : flag == "--seconds"   ? &seconds
                                                          : nullptr;
    if (option == nullptr || !is_number) {
      std::cerr << "usage: sonicmoe_fuzz [--cases N | --arguments N] [--seed S] [--seconds T] "
                   "[--case NUMBER_OF_ONE] [--attack NUMBER_OF_ONE]\n";
      return 2;
    }
    *option = value;
  }
  // Seeds of neighbouring runs do not overlap: case i of seed S is number S * 2^32 + i.
  if (arguments > 0) return sonicmoe::rig::fuzz_arguments(seed << 32, arguments);
  return sonicmoe::rig::fuzz(seed << 32, cases, seconds);
}
