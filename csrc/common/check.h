// Checks of arguments, as `<op>: <argument> must be <rule>, got <actual>`.
//
// Not torch's STD_TORCH_CHECK: it puts its own file's path into the text, and builds it with iostreams, which crash in
// a library that a toolchain has linked with a libstdc++ of its own.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace inlay {

inline std::string text_of(const char* text) { return text; }
inline std::string text_of(const std::string& text) { return text; }
inline std::string text_of(int64_t value) { return std::to_string(value); }

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::runtime_error((std::string() + ... + text_of(parts)));
}

// Throws with all the parts put together unless the condition holds; the parts are evaluated only then.
#define INLAY_CHECK(condition, ...)      \
  do {                                   \
    if (!(condition)) fail(__VA_ARGS__); \
  } while (false)

// The member of an enum that an integer argument names.
template <class Enum>
Enum enum_from(const char* op, const char* argument, int64_t value, Enum last) {
  INLAY_CHECK(value >= 0 && value <= static_cast<int64_t>(last), op, ": ", argument, " must be 0 to ",
              static_cast<int64_t>(last), ", got ", value);
  return static_cast<Enum>(value);
}

}  // namespace inlay
