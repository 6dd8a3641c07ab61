// What the headers of a recent GCC refer to and the libraries of manylinux_2_28 (libstdc++ of GCC 8,
// glibc 2.28) do not have. Compiled into each library and hidden there. The rest of libstdc++ stays the
// system's: PyTorch's exceptions and ours cross from one library to the other, so both should have the same.
#include <new>
#include <sstream>

extern "C" {
char __libc_single_threaded = 0;  // false: reference counts are atomic
}

namespace std {
void __throw_bad_array_new_length() {
    throw bad_array_new_length();
}
template basic_stringstream<char>::basic_stringstream();
template basic_ostringstream<char>::basic_ostringstream();
}  // namespace std
