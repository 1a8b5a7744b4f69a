#include "common/check.h"

#include <stdexcept>

namespace inlay {

void fail_with(std::initializer_list<MessagePart> parts) {
  std::string message;
  for (const MessagePart& part : parts) message += part.text ? part.text : std::to_string(part.number);
  throw std::runtime_error(message);
}

}  // namespace inlay
