// sonicmoe man: the manual page in roff, from the descriptions that --help shows.
#include <cstdio>
#include <regex>
#include <string>

#include "cli/command.hpp"
#include "cli/options.hpp"
#include "sonicmoe/version.hpp"

namespace sonicmoe::cli {
namespace {

// Roff takes a bare '-' for a hyphen, which the shell does not understand.
std::string escaped(const std::string& text) {
  return std::regex_replace(text, std::regex("-"), "\\-");
}

std::string options_of(const CLI::App& command) {
  std::string roff;
  for (const CLI::Option* option : command.get_options()) {
    const bool positional = option->get_positional();
    roff += ".TP\n\\fB" + escaped(option->get_name(positional, !positional)) + "\\fR";
    if (option->get_items_expected_max() > 0) {
      const std::string type = escaped(option->get_type_name());
      roff += " \\fI" + std::regex_replace(type, std::regex(","), ",\\:") + "\\fR";  // may break
    }
    if (!option->get_default_str().empty()) {
      roff += " (" + escaped(option->get_default_str()) + ")";
    }
    roff += "\n" + escaped(option->get_description()) + "\n";
  }
  return roff;
}

// "Examples:\n  line\n  line" as it stands.
std::string examples_of(const CLI::App& command) {
  const std::string footer = command.get_footer();
  const std::size_t end = footer.find('\n');
  if (end == std::string::npos) return {};
  return ".PP\nExamples:\n.PP\n.nf\n" + escaped(footer.substr(end + 1)) + "\n.fi\n";
}

constexpr const char* kEnd = R"(.SH EXIT STATUS
.nf
0  done, and all of the output was written
1  the work had begun and failed
2  the request makes no sense; nothing was computed
.fi
.SH ENVIRONMENT
.nf
SONICMOE_BACKEND       stands for a missing \-\-backend
SONICMOE_LOG=dispatch  one line for each operation on stderr: the backend, the kernels, and why
NO_COLOR               anything but empty: no colors
.fi
)";

}  // namespace

void add_man(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("man", "Print the manual page");
  add_examples(*command, {"sonicmoe man | man -l -"});
  command->callback([&action, &app] {
    action = [&app] {
      std::string roff = ".TH SONICMOE 1 \"\" \"sonicmoe " + std::string(version()) +
                         "\" \"User Commands\"\n.SH NAME\nsonicmoe \\- " +
                         escaped(app.get_description()) +
                         "\n.SH SYNOPSIS\n\\fBsonicmoe\\fR \\fICOMMAND\\fR [\\fIOPTION\\fR]...\n" +
                         ".SH OPTIONS\n" + options_of(app) + ".SH COMMANDS\n";
      for (const CLI::App* sub : app.get_subcommands([](const CLI::App*) { return true; })) {
        roff += ".SS sonicmoe " + sub->get_name() + "\n" + escaped(sub->get_description()) + "\n" +
                options_of(*sub) + examples_of(*sub);
      }
      std::fputs((roff + kEnd).c_str(), stdout);
      return kSuccess;
    };
  });
}

}  // namespace sonicmoe::cli
