# _C: CPU features and build facts through pybind11. Knows nothing of torch.
add_library(_C MODULE csrc/bind/module.cpp csrc/cpu/isa.cpp)
target_include_directories(_C SYSTEM PRIVATE ${LK_PYTHON_INCLUDE} ${LK_PYBIND11_INCLUDE})
target_compile_definitions(_C PRIVATE
  LK_BUILD_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
  LK_BUILD_ISAS="${LK_ISA_NAMES}"
  LK_BUILD_TORCH="${LK_TORCH_VERSION}"
  LK_BUILD_CUDA="${LK_CUDA_TOOLKIT}"
  LK_BUILD_CUDA_ARCHS="${LK_CUDA_NAMES}")
set_target_properties(_C PROPERTIES PREFIX "" SUFFIX "${LK_EXT_SUFFIX}")
if(APPLE)
  target_link_options(_C PRIVATE -undefined dynamic_lookup)
endif()
