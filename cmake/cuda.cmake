# The CUDA op library, a shared object of its own: it loads only where there is a device.
set(CMAKE_CUDA_COMPILER ${LK_CUDA_COMPILER})
execute_process(COMMAND ${LK_CUDA_COMPILER} --list-gpu-code OUTPUT_VARIABLE known_archs)
set(CMAKE_CUDA_ARCHITECTURES "")
foreach(arch 80 90a 100)
  string(REPLACE "a" "" listed ${arch})  # nvcc does not list the arch-specific names
  if(known_archs MATCHES "sm_${listed}\n")
    list(APPEND CMAKE_CUDA_ARCHITECTURES ${arch}-real)
    list(APPEND LK_CUDA_NAMES sm_${arch})
  endif()
endforeach()
list(APPEND CMAKE_CUDA_ARCHITECTURES 80-virtual)  # PTX: what else there is compiles it when it loads
list(APPEND LK_CUDA_NAMES compute_80)
list(JOIN LK_CUDA_NAMES "," LK_CUDA_NAMES)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
set(LK_CUDA_TOOLKIT ${CMAKE_CUDA_COMPILER_VERSION})

add_library(lk_torch_cuda_stub SHARED csrc/cuda/libtorch_cuda_stub.cpp)
set_target_properties(lk_torch_cuda_stub PROPERTIES
  OUTPUT_NAME torch_cuda LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/stub)

file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu csrc/bind/ops_cuda_*.cpp)
add_library(_ops_cuda MODULE ${cuda_sources})
if("90a-real" IN_LIST CMAKE_CUDA_ARCHITECTURES)
  target_compile_definitions(_ops_cuda PRIVATE LK_HAVE_SM90A=1)
endif()
# A source takes minutes for all architectures: where cores would idle, one of them compiles each.
cmake_host_system_information(RESULT cores QUERY NUMBER_OF_LOGICAL_CORES)
if(cores GREATER_EQUAL 8 AND NOT DEFINED ENV{MAX_JOBS})
  target_compile_options(_ops_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--threads=4>)
endif()
target_link_libraries(_ops_cuda PRIVATE lk_torch lk_torch_cuda_stub
  ${LK_TORCH_DIR}/lib/libtorch_cpu${CMAKE_SHARED_LIBRARY_SUFFIX})
target_link_options(_ops_cuda PRIVATE -Wl,--exclude-libs,ALL)
set_target_properties(_ops_cuda PROPERTIES PREFIX "" SUFFIX ".so" SKIP_BUILD_RPATH ON)
