# Finds LibTorch by asking Python, and makes the target
#   inlay::torch   headers and libtorch_cpu
#
# torch's own find_package(Torch) is not used: it rewrites CUDA arch flags, and fails when torch has CUDA but nvcc is
# absent. A C++ LibTorch archive without Python works through -DTORCH_DIR=<folder with include/ and lib/>.
if(NOT TORCH_DIR)
  find_package(Python REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
      "import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec('torch').origin).parent)"
    OUTPUT_VARIABLE TORCH_DIR
    OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_QUIET
    RESULT_VARIABLE torch_missing)
  if(torch_missing)
    message(FATAL_ERROR "inlay: ${Python_EXECUTABLE} has no torch; install torch>=2.11 there first")
  endif()
endif()

# headeronly/version.h is itself younger than 2.8, so a torch without it is too old as well.
set(version_header ${TORCH_DIR}/include/torch/headeronly/version.h)
set(torch_version 0)
if(EXISTS ${version_header})
  file(READ ${version_header} version_text)
  string(REGEX REPLACE ".*TORCH_VERSION_MAJOR ([0-9]+).*TORCH_VERSION_MINOR ([0-9]+).*" "\\1.\\2" torch_version
                       "${version_text}")
endif()
if(torch_version VERSION_LESS 2.11)
  message(FATAL_ERROR "inlay: the torch in ${TORCH_DIR} must be 2.11 or later")
endif()
message(STATUS "inlay: building with torch ${torch_version} in ${TORCH_DIR}, to run on 2.11 and later")

find_library(TORCH_CPU_LIBRARY torch_cpu PATHS ${TORCH_DIR}/lib NO_DEFAULT_PATH NO_CACHE REQUIRED)
add_library(inlay_torch INTERFACE)
target_include_directories(inlay_torch SYSTEM INTERFACE ${TORCH_DIR}/include)
target_link_libraries(inlay_torch INTERFACE ${TORCH_CPU_LIBRARY})
# The oldest torch to run on (2.11); the headers then offer nothing newer.
target_compile_definitions(inlay_torch INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
add_library(inlay::torch ALIAS inlay_torch)
