#include "oracle/rounding.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace sonicmoe::oracle {
namespace {

// A sum without rounding: a few float64 terms of rising size that do not overlap, so the last one
// has the sign of the sum (Shewchuk, "Adaptive precision floating-point arithmetic", 1997).
class ExactTerms {
 public:
  void add(double x) {
    Values kept;
    for (const double term : terms_) {  // x + term = sum + error, exactly (Knuth)
      const double sum = x + term, part = sum - x;
      const double error = (x - (sum - part)) + (term - part);
      if (error != 0.0) kept.push_back(error);
      x = sum;
    }
    if (x != 0.0) kept.push_back(x);
    terms_ = kept;
  }
  void add(const ExactTerms& other, double sign) {
    for (const double term : other.terms_) add(sign * term);
  }
  double sign() const { return terms_.empty() ? 0.0 : std::copysign(1.0, terms_.back()); }

 private:
  Values terms_;
};

std::int64_t nearest_multiple(std::int64_t f, std::int64_t tile) {
  const std::int64_t low = f / tile * tile, high = low + tile;
  if (f - low != high - f) return f - low < high - f ? low : high;
  return low / tile % 2 == 0 ? low : high;
}

// The `count` best tokens of one expert: those that chose it first, then by score, then by token.
struct Ranking {
  Ids tokens;
  std::vector<float> scores;  // in that order
};

Ranking rank(const std::vector<float>& scores, const std::vector<bool>& chose,
             std::int64_t num_experts, std::int64_t expert, std::int64_t count) {
  struct Place {
    bool chose;
    float score;
    std::int64_t token;
  };
  const auto before = [](const Place& a, const Place& b) {
    if (a.chose != b.chose) return a.chose;
    return a.score != b.score ? a.score > b.score : a.token < b.token;
  };
  std::vector<Place> places;
  for (std::size_t t = 0; t < chose.size(); ++t) {
    const std::int64_t token = static_cast<std::int64_t>(t);
    places.push_back({chose[t], scores[at(token * num_experts + expert)], token});
  }
  std::nth_element(places.begin(), places.begin() + count, places.end(), before);
  std::sort(places.begin(), places.begin() + count, before);
  Ranking result;
  for (std::int64_t place = 0; place < count; ++place) {
    result.tokens.push_back(places[at(place)].token);
    result.scores.push_back(places[at(place)].score);
  }
  return result;
}

// f' of one expert with f rows, low = floor_M(f), high = low + M; `carry` is sum f' - f so far.
std::int64_t rounded(const RoundingOptions& rounding, std::int64_t expert, std::int64_t f,
                     std::int64_t carry, const std::vector<float>& ranked) {
  const std::int64_t low = f / rounding.tile * rounding.tile, high = low + rounding.tile;
  switch (rounding.policy) {
    case RoundingPolicy::kNearest:
      return nearest_multiple(f, rounding.tile);
    case RoundingPolicy::kUp:
      return high;
    case RoundingPolicy::kDown:
      return low;
    case RoundingPolicy::kStochastic: {  // bits / 2^32 < (f - low) / M
      const std::uint64_t seed = rounding.seed_tensor.defined()
                                     ? static_cast<std::uint64_t>(to_ids(rounding.seed_tensor)[0])
                                     : rounding.seed;
      const std::uint64_t bits = rounding_bits(seed, static_cast<std::uint32_t>(expert));
      const auto remainder = static_cast<std::uint64_t>(f - low);
      return bits * static_cast<std::uint64_t>(rounding.tile) < remainder << 32 ? high : low;
    }
    case RoundingPolicy::kBalanced: {
      const std::int64_t down = std::abs(carry + low - f), up = std::abs(carry + high - f);
      return up == down ? nearest_multiple(f, rounding.tile) : up < down ? high : low;
    }
    case RoundingPolicy::kNearestScore: {
      const std::span<const float> all(ranked);
      return changes_less(all.subspan(at(f), at(high - f)), all.subspan(at(low), at(f - low)))
                 ? high
                 : low;
    }
  }
  return low;
}

}  // namespace

bool changes_less(std::span<const float> added, std::span<const float> dropped) {
  const auto is_infinite = [](std::span<const float> scores) {
    return std::any_of(scores.begin(), scores.end(), [](float s) { return std::isinf(s); });
  };
  if (is_infinite(added)) return false;
  if (is_infinite(dropped)) return true;
  ExactTerms a, b, difference;
  for (const float score : added) a.add(score);
  for (const float score : dropped) b.add(score);
  difference.add(a, a.sign());
  difference.add(b, -b.sign());
  return difference.sign() < 0.0;
}

std::uint32_t rounding_bits(std::uint64_t seed, std::uint32_t expert) {
  std::uint32_t c[4] = {expert, 0, 0, 0};
  std::uint32_t key[2] = {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53} * c[0],
                        p1 = std::uint64_t{0xCD9E8D57} * c[2];
    const auto high0 = static_cast<std::uint32_t>(p0 >> 32);
    const auto high1 = static_cast<std::uint32_t>(p1 >> 32);
    c[0] = high1 ^ c[1] ^ key[0];
    c[1] = static_cast<std::uint32_t>(p1);
    c[2] = high0 ^ c[3] ^ key[1];
    c[3] = static_cast<std::uint32_t>(p0);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return c[0];
}

RoundedRows round_rows(const RoundingOptions& rounding, const std::vector<float>& scores,
                       const Ids& topk_ids, std::int64_t num_tokens, const Ids& targets) {
  RoundedRows result;
  const std::int64_t E = static_cast<std::int64_t>(scores.size()) / num_tokens;
  const std::int64_t K = static_cast<std::int64_t>(topk_ids.size()) / num_tokens;
  std::vector<std::vector<bool>> chose(at(E), std::vector<bool>(at(num_tokens)));
  for (std::int64_t p = 0; p < num_tokens * K; ++p) chose[at(topk_ids[at(p)])][at(p / K)] = true;
  std::int64_t carry = 0;
  for (std::int64_t e = 0; e < E; ++e) {
    const std::int64_t f = std::count(chose[at(e)].begin(), chose[at(e)].end(), true);
    const std::int64_t low = f / rounding.tile * rounding.tile;
    const std::int64_t most =
        targets.empty() ? std::min(low + rounding.tile, num_tokens) : targets[at(e)];
    const Ranking ranking = rank(scores, chose[at(e)], E, e, most);
    std::int64_t after = targets.empty() ? low : most;
    if (targets.empty() && f != low && low + rounding.tile <= num_tokens) {
      after = rounded(rounding, e, f, carry, ranking.scores);
    }
    carry += after - f;
    result.rows_per_expert_before.push_back(f);
    result.rows_per_expert.push_back(after);
    Ids kept(ranking.tokens.begin(), ranking.tokens.begin() + after);
    std::sort(kept.begin(), kept.end());
    result.token_ids.insert(result.token_ids.end(), kept.begin(), kept.end());
    result.expert_ids.insert(result.expert_ids.end(), kept.size(), e);
  }
  return result;
}

}  // namespace sonicmoe::oracle
