// sonicmoe_fuzz --cases N [--seed S] [--seconds T] [--case C]: random shapes, layouts, routings and
// options of the expert layer on every backend, each compared with the float64 oracle. All-zero
// results where the oracle has none count as failures. --seconds ends the run early; the last line
// says how many cases were run.
// sonicmoe_fuzz --arguments N [--seed S] [--attack A]: random operations with one argument made
// wrong: refused with its name and nothing changed, or computed right.
// A failure prints one line that repeats it.
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

#include "fuzz/arguments.hpp"
#include "rig/compare.hpp"
#include "rig/random.hpp"

namespace sonicmoe::rig {
namespace {

using Form = MoEShape::Form;

// Sizes that matter: tiny ones, and those around the widths of vectors and tiles.
std::int64_t random_size(Random& random, std::int64_t most) {
  if (random.chance(0.5)) return random.integer(1, std::min<std::int64_t>(most, 9));
  return random.integer(1, most);
}

MoECase random_case(std::uint64_t seed) {
  Random random(seed);
  const std::vector<Activation> activations(all_activations().begin(), all_activations().end());
  const std::vector<Strides> weight_strides = {Strides::kContiguous, Strides::kPadded,
                                               Strides::kTransposed, Strides::kTransposedPadded};
  MoECase c;
  c.seed = random.bits() >> 2;
  c.num_tokens = random.chance(0.03) ? 0 : random_size(random, 40);
  c.hidden_size = random_size(random, 40);
  c.intermediate_size = random_size(random, 36);
  c.num_experts = random_size(random, 20);
  c.top_k = random.integer(1, std::min<std::int64_t>(c.num_experts, 6));
  c.num_pairs = random.chance(0.03) ? 0 : random_size(random, 90);
  c.tail_rows = random.chance(0.5) ? random.integer(0, c.num_pairs) : 0;
  c.form = random.pick<Form>({Form::kTopK, Form::kSorted, Form::kPairs});
  c.activation = random.pick(activations);
  c.gate_up_layout =
      random.pick<GateUpLayout>({GateUpLayout::kConcatenated, GateUpLayout::kInterleaved});
  c.dtype = random.pick<DType>({DType::kFloat32, DType::kBFloat16});
  c.id_dtype = random.pick<DType>({DType::kInt32, DType::kInt64});
  c.routing_weight_dtype = random.pick<DType>({DType::kFloat32, DType::kBFloat16});
  c.biases = random.chance(0.5);
  c.row_weights = random.chance(0.7);
  c.x_strides = random.pick<Strides>({Strides::kContiguous, Strides::kPadded});
  c.w1_strides = random.pick(weight_strides);
  c.w2_strides = random.pick(weight_strides);
  c.load = random.pick<Load>({Load::kUniform, Load::kUniform, Load::kOneExpert, Load::kSomeEmpty});
  c.drop_probability = random.pick<double>({0.0, 0.0, 0.3, 1.0});
  return c;
}

RunOptions random_options(std::uint64_t seed, const Target& target, const MoECase& c) {
  Random random(seed ^ 0x5DEECE66Du);
  RunOptions options;
  options.num_threads = static_cast<int>(random.integer(1, 3));
  options.inference = random.chance(0.2);
  if (random.chance(0.3)) options.gradients = static_cast<unsigned>(random.integer(0, 63));
  if (random.chance(0.4)) options.gradient_dtype = DType::kFloat32;
  const bool float_gradients = options.gradient_dtype.value_or(c.dtype) == DType::kFloat32;
  options.accumulate = float_gradients && random.chance(0.3);
  options.accumulate_onto = options.accumulate ? 1.0 : 0.0;
  if (random.chance(0.4)) {
    const MoEShape shape = MoEInputs(host_target(), c).shape();
    const Context context = target.context(options.num_threads);
    options.forward_limit = moe_forward_workspace(context, shape, options.inference).minimum_bytes;
    options.backward_limit = moe_backward_workspace(context, shape).minimum_bytes;
  }
  return options;
}

// Problems of one seed on one backend.
std::vector<std::string> problems_of(std::uint64_t seed, const Target& target, std::string* what) {
  const MoECase c = fitted(target, random_case(seed));
  *what = c.describe();
  try {
    const RunOptions options = random_options(seed, target, c);
    return check_run(c, options, run_moe(target, c, options), Strictness::kTiny);
  } catch (const std::exception& error) {
    return {std::string("exception: ") + error.what()};
  }
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
      std::string what;
      for (const std::string& problem : problems_of(seed, target, &what)) {
        if (good) {
          std::cout << "FAIL sonicmoe_fuzz --case " << seed << "  [" << target.backend << "] "
                    << what << '\n';
        }
        good = false;
        std::cout << "     " << problem << '\n';
      }
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
