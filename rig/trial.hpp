// What has to come of a wrong argument: an Error with its name and nothing changed, or right
// results.
#pragma once

#include <string>

#include "rig/attacks.hpp"

namespace sonicmoe::rig {

/// Runs attacks on one call.
class Trial {
 public:
  /// Runs the valid call. Its results are what attacks that keep the values have to give.
  explicit Trial(Call call);

  /// What is wrong with the valid call: refused, all zeros, NaN, memory that it must not touch.
  const std::string& problem() const { return problem_; }
  const Call& call() const { return call_; }

  /// What is wrong with the outcome of an attack, or empty. It has to be refused with an Error that
  /// names the argument, nothing having changed, and the valid call has to work afterwards; or,
  /// where the operation may take it, the results have to be right.
  std::string attempt(const Attack& attack);

 private:
  struct Forgery;
  Forgery forge(const Attack& attack) const;
  void forge_view(const Attack& attack, Forgery& forgery) const;
  void forge_memory(const Attack& attack, Forgery& forgery) const;
  void leave_out(Forgery& forgery) const;
  Elements expected_results(const Forgery& forgery);
  std::string check_refusal(const Forgery& forgery, const Outcome& outcome);
  std::string check_results(const Forgery& forgery, const Elements& expected);
  std::string check_valid_call();

  Call call_;
  Elements results_;  // of the valid call
  std::string problem_;
};

}  // namespace sonicmoe::rig
