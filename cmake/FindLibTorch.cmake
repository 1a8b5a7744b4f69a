# Finds LibTorch by asking Python, and makes two imported targets:
#   inlay::torch       headers and libtorch_cpu
#   inlay::torch_cuda  the name libtorch_cuda, even where the installed torch is a CPU build
#
# torch's own find_package(Torch) is not used: it rewrites CUDA arch flags, and fails when torch has CUDA but nvcc is
# absent. A C++ LibTorch archive without Python works through -DTORCH_DIR=<folder with include/ and lib/>.
if(NOT TORCH_DIR)
  find_package(Python REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parent)"
    OUTPUT_VARIABLE TORCH_DIR
    OUTPUT_STRIP_TRAILING_WHITESPACE
    RESULT_VARIABLE torch_import_failed)
  if(torch_import_failed)
    message(FATAL_ERROR "inlay: ${Python_EXECUTABLE} cannot import torch; install torch>=2.11 there first")
  endif()
endif()

find_library(TORCH_CPU_LIBRARY torch_cpu PATHS ${TORCH_DIR}/lib NO_DEFAULT_PATH NO_CACHE REQUIRED)
add_library(inlay_torch INTERFACE)
target_include_directories(inlay_torch SYSTEM INTERFACE ${TORCH_DIR}/include)
target_link_libraries(inlay_torch INTERFACE ${TORCH_CPU_LIBRARY})
# The oldest torch to run on (2.11); the headers then offer nothing newer.
target_compile_definitions(inlay_torch INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
add_library(inlay::torch ALIAS inlay_torch)
