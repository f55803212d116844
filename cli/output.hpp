// The standard streams: what is lost is noticed, and every error is one line.
#pragma once

#include <cstdio>
#include <string>

namespace sonicmoe::cli {

/// Before anything is opened or written: a full disk, a file size limit and a reader that left are
/// errors of the write and end no process; a stream that was closed is an error of the first write
/// and is no file that happens to be opened next.
void prepare_streams();

bool is_terminal(std::FILE* stream);

/// Select Graphic Rendition codes of ECMA-48.
inline constexpr const char* kBold = "1";
inline constexpr const char* kRed = "1;31";
inline constexpr const char* kYellow = "1;33";

/// `text` in this style where `stream` is a terminal that shows one and NO_COLOR is unset or empty.
std::string styled(std::FILE* stream, const char* style, const std::string& text);

/// "sonicmoe: message" in one line on stderr, whatever the message was made of.
void report(const std::string& message);

/// `status`, or kFailure with a line on stderr where not all of the output could be written. The
/// last thing to be called: nothing can be printed after it.
int finish_output(int status);

}  // namespace sonicmoe::cli
