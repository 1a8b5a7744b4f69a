#include <stdexcept>
#include "norm/params.h"
namespace inlay::norm {
int64_t partial_rows(const BackwardParams&) { return 1; }
void forward(const ForwardParams&, void*) { throw std::runtime_error("not yet"); }
void backward(const BackwardParams&, void*) { throw std::runtime_error("not yet"); }
}
