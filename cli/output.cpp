#include "cli/output.hpp"

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cli/command.hpp"

#if defined(__unix__)
#include <fcntl.h>
#include <unistd.h>

#include <csignal>
#endif

namespace sonicmoe::cli {

bool is_terminal([[maybe_unused]] std::FILE* stream) {
#if defined(__unix__)
  return isatty(fileno(stream)) != 0;
#else
  return false;
#endif
}

std::string styled(std::FILE* stream, const char* style, const std::string& text) {
  const auto is_set = [](const char* value) { return value != nullptr && *value != '\0'; };
  const char* terminal = std::getenv("TERM");
  const bool plain = is_set(std::getenv("NO_COLOR")) || !is_set(terminal) ||
                     std::strcmp(terminal, "dumb") == 0 || !is_terminal(stream);
  return plain ? text : "\033[" + std::string(style) + "m" + text + "\033[0m";
}

void prepare_streams() {
#if defined(__unix__)
  for (int stream = STDIN_FILENO; stream <= STDERR_FILENO; ++stream) {
    if (fcntl(stream, F_GETFD) != -1 || errno != EBADF) continue;
    // open() takes the lowest free number, this one; the wrong direction keeps its use an error.
    (void)open("/dev/null", stream == STDIN_FILENO ? O_WRONLY : O_RDONLY);
  }
  // Of an output that fits the buffer the last write tells why it fails.
  static std::array<char, 1 << 18> buffer;
  if (!is_terminal(stdout)) std::setvbuf(stdout, buffer.data(), _IOFBF, buffer.size());
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);
#endif
}

void report(const std::string& message) {
  constexpr std::size_t kMostShown = 8192;
  std::string line = message.substr(0, kMostShown);
  while (!line.empty() && line.back() == '\n') line.pop_back();
  for (char& c : line) {  // the names of files and what stands in them may be anything
    const auto code = static_cast<unsigned char>(c);
    if (c == '\n' || c == '\t')
      c = ' ';
    else if (code < 0x20 || code == 0x7f)
      c = '?';
  }
  const std::string name = "sonicmoe: ";
  if (line.starts_with(name)) line.erase(0, name.size());
  std::fprintf(stderr, "%s%s\n", styled(stderr, kRed, name).c_str(), line.c_str());
}

int finish_output(int status) {
  const bool lost = std::ferror(stdout) != 0;
  errno = 0;
  const bool failed = std::fclose(stdout) != 0;  // what the buffer holds, and what close() says
  if (!lost && !failed) return status;
  const char* reason = failed && errno != 0 ? std::strerror(errno) : "not all of it was taken";
  std::fprintf(stderr, "sonicmoe: cannot write the output: %s\n", reason);
  return status == kSuccess ? kFailure : status;
}

}  // namespace sonicmoe::cli
