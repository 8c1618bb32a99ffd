# Decides whether the CUDA library is built, for which architectures, and builds it. Sets, for the
# build record: cuda_built (true or false), cuda_reason (why, one sentence), cuda_archs (list).

file(GLOB cuda_sources CONFIGURE_DEPENDS
  "${CMAKE_SOURCE_DIR}/csrc/cuda/*.cu" "${CMAKE_SOURCE_DIR}/csrc/cuda/*.cpp")
find_program(LOWBIT_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)

if(NOT LOWBIT_CUDA MATCHES "^(0|1|auto)$")
  message(FATAL_ERROR "lowbit: LOWBIT_CUDA must be 0, 1 or auto, got ${LOWBIT_CUDA}")
endif()

set(cuda_built false)
set(cuda_archs "")
if(LOWBIT_CUDA STREQUAL "0")
  set(cuda_reason "switched off with LOWBIT_CUDA=0")
elseif(NOT cuda_sources)
  set(cuda_reason "no sources in csrc/cuda")
elseif(NOT LOWBIT_NVCC)
  set(cuda_reason "nvcc was not found on PATH, in CUDA_HOME or in /usr/local/cuda")
  if(LOWBIT_CUDA STREQUAL "1")
    message(FATAL_ERROR "lowbit: LOWBIT_CUDA=1, but ${cuda_reason}; "
                        "install the CUDA toolkit or set LOWBIT_CUDA=0")
  endif()
else()
  set(cuda_built true)
  set(cuda_reason "built with ${LOWBIT_NVCC}")
endif()

if(NOT cuda_built)
  message(STATUS "lowbit: CUDA library not built: ${cuda_reason}")
  # One left by an earlier build would be loaded all the same.
  file(REMOVE "${CMAKE_SOURCE_DIR}/lowbit/_C_cuda.so")
  return()
endif()

# ---- architectures -------------------------------------------------------------------------------
#
# "80" means machine code for sm_80 and PTX that newer cards compile for themselves; "-real" means
# machine code only.

execute_process(COMMAND "${LOWBIT_NVCC}" --list-gpu-code OUTPUT_VARIABLE nvcc_targets)
if(LOWBIT_CUDA_ARCHS STREQUAL "default")
  set(cuda_archs 80 90a-real)
elseif(LOWBIT_CUDA_ARCHS STREQUAL "all")
  foreach(arch 80 86 89 90a 100 120)
    string(REGEX REPLACE "a$" "" number "${arch}")
    if(nvcc_targets MATCHES "sm_${number}")
      list(APPEND cuda_archs "${arch}-real")
      set(newest "${number}")
    endif()
  endforeach()
  list(APPEND cuda_archs 80-virtual ${newest}-virtual)
else()
  string(REGEX REPLACE "[ ,]+" ";" cuda_archs "${LOWBIT_CUDA_ARCHS}")
endif()
message(STATUS "lowbit: CUDA library for ${cuda_archs}, ${cuda_jobs} jobs")

set(CMAKE_CUDA_COMPILER "${LOWBIT_NVCC}")
set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
set(CMAKE_CUDA_ARCHITECTURES "${cuda_archs}")
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3")
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)

# ---- the library ---------------------------------------------------------------------------------
#
# A file whose name ends in _sm90.cu (or _sm100, _sm120) uses instructions of that family alone, so
# it is compiled for that one target whatever the list says. Every other file, _sm80.cu included, is
# compiled for the whole list.

set(cuda_families "")
foreach(source IN LISTS cuda_sources)
  if(source MATCHES "_sm([0-9]+)\\.cu$" AND NOT CMAKE_MATCH_1 STREQUAL "80")
    list(APPEND cuda_families ${CMAKE_MATCH_1})
    list(APPEND cuda_sources_${CMAKE_MATCH_1} "${source}")
    list(REMOVE_ITEM cuda_sources "${source}")
  endif()
endforeach()
list(REMOVE_DUPLICATES cuda_families)

function(lowbit_cuda_settings target)
  target_compile_definitions(${target} PRIVATE USE_CUDA)
  target_include_directories(${target} SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,-ffp-contract=off>)
  set_target_properties(${target} PROPERTIES JOB_POOL_COMPILE cuda)
endfunction()

add_library(_C_cuda MODULE ${cuda_sources})
lowbit_library(_C_cuda)
lowbit_cuda_settings(_C_cuda)

foreach(family IN LISTS cuda_families)
  add_library(cuda_sm${family} OBJECT ${cuda_sources_${family}})
  lowbit_compile_settings(cuda_sm${family})
  lowbit_cuda_settings(cuda_sm${family})
  set_target_properties(cuda_sm${family} PROPERTIES CUDA_ARCHITECTURES "${family}a-real")
  target_sources(_C_cuda PRIVATE $<TARGET_OBJECTS:cuda_sm${family}>)
endforeach()

# The C ABI's CUDA half (current stream, device guard) lives in libtorch_cuda.so, which a CPU build
# of torch lacks. There an empty library of that name is linked in its place, so that the result
# asks for the real one when it is loaded.
set(torch_cuda "${TORCH_DIR}/lib/libtorch_cuda.so")
if(NOT EXISTS "${torch_cuda}")
  file(WRITE "${CMAKE_BINARY_DIR}/stand_in/empty.cpp" "")
  add_library(torch_cuda_stand_in SHARED "${CMAKE_BINARY_DIR}/stand_in/empty.cpp")
  set_target_properties(torch_cuda_stand_in PROPERTIES
    OUTPUT_NAME torch_cuda LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/stand_in")
  set(torch_cuda torch_cuda_stand_in)
endif()
target_link_libraries(_C_cuda PRIVATE -Wl,--no-as-needed ${torch_cuda})
