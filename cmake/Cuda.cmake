# Decides whether the CUDA library is built, and for which architectures.
#   INLAY_HAS_CUDA                                result
#   inlay_configure_cuda_target(<lib>)            compiles and links a CUDA library of ours as it needs
#   inlay_add_hopper_sources(<lib> <source> ...)  adds kernels of Hopper's own instructions, compiled for it alone
set(INLAY_HAS_CUDA OFF)
if(NOT INLAY_CUDA STREQUAL "OFF")
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)  # an earlier "not found": look again
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(INLAY_HAS_CUDA ON)
  elseif(INLAY_CUDA STREQUAL "ON")
    message(FATAL_ERROR "inlay: INLAY_CUDA is ON but nvcc was not found; put it on PATH or set CUDACXX")
  endif()
endif()
if(NOT INLAY_HAS_CUDA)
  if(INLAY_CUDA STREQUAL "OFF")
    message(STATUS "inlay: INLAY_CUDA is OFF: building the CPU package without CUDA kernels")
  else()
    message(STATUS "inlay: no working nvcc found: building the CPU package without CUDA kernels")
  endif()
  return()
endif()

if(INLAY_CUDA_ARCHITECTURES)
  # Code for 90 runs on the same GPUs as code for 90a, and has not all of their instructions.
  set(CMAKE_CUDA_ARCHITECTURES ${INLAY_CUDA_ARCHITECTURES})
  list(TRANSFORM CMAKE_CUDA_ARCHITECTURES REPLACE "^90$" "90a-real;90-virtual")
  list(TRANSFORM CMAKE_CUDA_ARCHITECTURES REPLACE "^90-real$" "90a-real")
else()
  execute_process(
    COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE compute_capability
    ERROR_QUIET
    RESULT_VARIABLE no_gpu)
  string(REGEX MATCHALL "[0-9]+\\.[0-9]+" present "${compute_capability}")
  list(REMOVE_DUPLICATES present)
  list(TRANSFORM present REPLACE "\\." "")
  list(TRANSFORM present REPLACE "^90$" "90a")
  list(TRANSFORM present APPEND "-real")
  if(no_gpu OR NOT present)
    set(present 90a-real 80-virtual)
  endif()
  set(CMAKE_CUDA_ARCHITECTURES ${present})
endif()
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
message(STATUS "inlay: building CUDA kernels for ${CMAKE_CUDA_ARCHITECTURES} with nvcc ${CMAKE_CUDA_COMPILER_VERSION}")

# libinlay_cuda needs one symbol of libtorch_cuda, the current stream. A CPU-only torch ships no such library to link
# against, so an empty one with its soname records the dependency for the loader of the machine that has it.
set(stub_source ${CMAKE_CURRENT_BINARY_DIR}/torch_cuda_stub.cpp)
file(CONFIGURE OUTPUT ${stub_source} CONTENT "")
add_library(inlay_torch_cuda_stub SHARED ${stub_source})
set_target_properties(inlay_torch_cuda_stub PROPERTIES
  OUTPUT_NAME torch_cuda
  LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/stub)

function(inlay_configure_cuda_compilation target)
  target_include_directories(${target} PRIVATE csrc ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  target_compile_definitions(${target} PRIVATE INLAY_CUDA USE_CUDA)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>
    $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -Xcompiler=-Wall -Xfatbin=-compress-all>
    $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${INLAY_CUDA_LINE_INFO}>>:-lineinfo>)
endfunction()

function(inlay_configure_cuda_target target)
  inlay_configure_cuda_compilation(${target})
  target_link_libraries(${target} PRIVATE inlay::torch)
  target_link_options(${target} PRIVATE
    -Wl,--no-as-needed $<TARGET_FILE:inlay_torch_cuda_stub> -Wl,--as-needed -Wl,--allow-shlib-undefined)
  add_dependencies(${target} inlay_torch_cuda_stub)
  set_target_properties(${target} PROPERTIES
    CUDA_RUNTIME_LIBRARY Static
    CUDA_SEPARABLE_COMPILATION OFF)
endfunction()

# For other architectures such kernels are empty, and are not started: where ours are asked for without 90a, one will do.
function(inlay_add_hopper_sources target)
  set(architectures ${CMAKE_CUDA_ARCHITECTURES})
  list(FILTER architectures INCLUDE REGEX "^90a")
  if(NOT architectures)
    list(GET CMAKE_CUDA_ARCHITECTURES 0 architectures)
  endif()
  add_library(${target}_hopper OBJECT ${ARGN})
  set_target_properties(${target}_hopper PROPERTIES CUDA_ARCHITECTURES "${architectures}")
  inlay_configure_cuda_compilation(${target}_hopper)
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:${target}_hopper>)
endfunction()
