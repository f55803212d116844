// For a library that runs with the C and C++ libraries of older systems (glibc 2.28, GCC 8) than
// the compiler's: what its headers take for granted and those lack. Linked into such a build alone.
#include <new>
#include <sstream>

// glibc 2.32 says here whether the process has one thread. Never: counters stay atomic.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

namespace std {

void __throw_bad_array_new_length() { throw bad_array_new_length(); }

template basic_ostringstream<char>::basic_ostringstream();
template basic_stringstream<char>::basic_stringstream();
template string basic_stringbuf<char>::str() const&;
template string basic_stringbuf<char>::str() &&;

}  // namespace std
