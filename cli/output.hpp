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

/// "sonicmoe: message" in one line on stderr, whatever the message was made of.
void report(const std::string& message);

/// `status`, or kFailure with a line on stderr where not all of the output could be written. The
/// last thing to be called: nothing can be printed after it.
int finish_output(int status);

}  // namespace sonicmoe::cli
