// SONICMOE_LOG=dispatch: one line on stderr for every call, with the backend that serves it, the
// kernels that were chosen, and why.
//   sonicmoe: dispatch: moe_layer_forward -> cpu (oneDNN 2.6.3, AVX2, 2 threads); passed over: ...;
//   up: 64 rows x 128 columns; Y: 1 slab of 4096 columns
#pragma once

#include <string>
#include <string_view>

namespace sonicmoe {

/// The line of one public call, written when the scope ends. Without SONICMOE_LOG=dispatch, and
/// inside another's scope, it does nothing.
class DispatchLine {
 public:
  explicit DispatchLine(std::string_view operation);
  ~DispatchLine();
  DispatchLine(const DispatchLine&) = delete;
  DispatchLine& operator=(const DispatchLine&) = delete;

  /// The line of this thread's call, or null where nobody asked for one.
  static DispatchLine* current() noexcept;
  /// `what` comes first in a note; without it, the note is the text alone.
  void add(std::string_view what, std::string_view text);

 private:
  std::string line_;
  bool first_ = true;
};

/// Adds "what: text()" to the line of this thread's call, if there is one: costs a load otherwise.
template <class Text>
void log_choice(std::string_view what, Text text) {
  if (DispatchLine* line = DispatchLine::current()) line->add(what, text());
}

}  // namespace sonicmoe
