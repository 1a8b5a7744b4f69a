# The instruction set tiers of the CPU kernels (csrc/common/cpu/isa.h).
#   inlay_add_cpu_tiers(<target> <folder>)  adds <folder>/tier_*.cpp, each compiled with its tier's flags
#
# No contraction of a * b + c behind our back: kernels say where they want a fused multiply-add, and rounding points
# stay those of the code replaced.
set(INLAY_CPU_TIER_FLAGS -ffp-contract=off -fno-math-errno)
set(INLAY_CPU_TIERS generic)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND INLAY_CPU_TIERS avx2 avx512 avx512_bf16)
  # Here plain C++ serves float64 and old machines alone. -O3 makes it a fifth faster and takes twice as long: it copies
  # loops for every flag that they ask about.
  set(INLAY_CPU_FLAGS_generic -O2)
  set(INLAY_CPU_FLAGS_avx2 -mavx2 -mfma -mf16c)
  # GCC 12's AVX-512 intrinsics name uninitialised operands on purpose, and then warn about them.
  set(INLAY_CPU_FLAGS_avx512
      ${INLAY_CPU_FLAGS_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -Wno-maybe-uninitialized -Wno-uninitialized)
  set(INLAY_CPU_FLAGS_avx512_bf16 ${INLAY_CPU_FLAGS_avx512} -mavx512bf16)
endif()

function(inlay_add_cpu_tiers target folder)
  foreach(tier IN LISTS INLAY_CPU_TIERS)
    set(source ${folder}/tier_${tier}.cpp)
    target_sources(${target} PRIVATE ${source})
    set_source_files_properties(${source} PROPERTIES
      COMPILE_OPTIONS "${INLAY_CPU_TIER_FLAGS};${INLAY_CPU_FLAGS_${tier}}")
  endforeach()
endfunction()
