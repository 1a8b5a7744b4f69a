// Checks of arguments, as `<op>: <argument> must be <rule>, got <actual>`.
//
// Not torch's STD_TORCH_CHECK: it puts its own file's path into the text, and builds it with iostreams, which crash in
// a library that a toolchain has linked with a libstdc++ of its own.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

namespace inlay {

// A piece of a message.
struct MessagePart {
  MessagePart(const char* text) : text(text) {}
  MessagePart(const std::string& text) : text(text.c_str()) {}
  MessagePart(int64_t number) : number(number) {}

  const char* text = nullptr;  // null: the number
  int64_t number = 0;
};

[[noreturn]] void fail_with(std::initializer_list<MessagePart> parts);

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  fail_with({MessagePart(parts)...});  // the text is put together in one place: there are many checks
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
