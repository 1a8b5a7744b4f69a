// What this build is: facts for `inlay.info()` and for tests. No tensors, no torch headers, and the package works
// without it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cpu/isa.h"
#include "conv/params.h"
#include "gdn/params.h"
#include "norm/params.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Introspection of Inlay's native build.";
  m.def(
      "build_config",
      [] {
        py::dict config;
        config["version"] = INLAY_VERSION;
        config["build_type"] = INLAY_BUILD_TYPE;
        config["compiler"] = INLAY_COMPILER;
        config["cuda_compiler"] = INLAY_CUDA_COMPILER;
        config["cuda_architectures"] = INLAY_CUDA_ARCHITECTURES;
        return config;
      },
      "How the native libraries were built, as a dict of strings; the CUDA entries are empty without CUDA.");
  m.def(
      "cpu_isa", [] { return inlay::cpu::name_of(inlay::cpu::isa_in_use()); },
      "The instruction set tier that the CPU kernels use in this process: the best one that this machine has, at most\n"
      "what INLAY_CPU_ISA names. RuntimeError when INLAY_CPU_ISA names no tier.");
  m.def(
      "cpu_isa_tiers",
      [] {
        std::vector<std::string> names;
        for (const inlay::cpu::Isa isa : inlay::cpu::available_isas()) names.emplace_back(inlay::cpu::name_of(isa));
        return names;
      },
      "The tiers that this machine can run, from \"generic\" upwards; each is a value for INLAY_CPU_ISA.");
  m.def(
      "norm_enums",
      [] {
        using namespace inlay::norm;
        py::dict enums;
        enums["RMS"] = static_cast<int>(Kind::rms);
        enums["LAYER"] = static_cast<int>(Kind::layer);
        enums["L2"] = static_cast<int>(Kind::l2);
        enums["ONCE"] = static_cast<int>(inlay::Rounding::once);
        enums["STEPWISE"] = static_cast<int>(inlay::Rounding::stepwise);
        enums["SILU"] = static_cast<int>(Activation::silu);
        enums["SIGMOID"] = static_cast<int>(Activation::sigmoid);
        return enums;
      },
      "The integers that the norm ops take, for the test that holds Python's enums to them.");
  m.def(
      "conv_enums",
      [] {
        using namespace inlay::conv;
        py::dict enums;
        enums["NONE"] = static_cast<int>(Activation::none);
        enums["SILU"] = static_cast<int>(Activation::silu);
        return enums;
      },
      "The integers that the conv ops take, for the test that holds Python's enum to them.");
  m.def(
      "gdn_enums",
      [] {
        using namespace inlay::gdn;
        py::dict enums;
        enums["AUTO"] = static_cast<int>(Mode::automatic);
        enums["CHUNK"] = static_cast<int>(Mode::chunk);
        enums["RECURRENT"] = static_cast<int>(Mode::recurrent);
        return enums;
      },
      "The integers that the gdn ops take, for the test that holds Python's enum to them.");
}
