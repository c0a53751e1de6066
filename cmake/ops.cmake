# The op libraries. TORCH_TARGET_VERSION keeps out symbols newer than torch 2.10, so one build serves all after.
add_library(lk_torch INTERFACE)
target_include_directories(lk_torch SYSTEM INTERFACE ${LK_TORCH_DIR}/include)
target_compile_definitions(lk_torch INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)

file(GLOB cpu_sources CONFIGURE_DEPENDS csrc/cpu/*.cpp)
file(GLOB isa_sources CONFIGURE_DEPENDS csrc/cpu/*_isa.cpp)
file(GLOB amx_sources CONFIGURE_DEPENDS csrc/cpu/*_amx.cpp)
file(GLOB cpu_bindings CONFIGURE_DEPENDS csrc/bind/ops_*.cpp)
list(FILTER cpu_bindings EXCLUDE REGEX "/ops_cuda_")
list(REMOVE_ITEM cpu_sources ${isa_sources} ${amx_sources})

# Objects go in from the plainest instruction set up: of an inline function that several files emit the linker
# keeps the first, and that one must run on every machine.
set(isa_objects "")
function(lk_add_level isa)
  add_library(lk_cpu_${isa} OBJECT ${ARGN})
  target_compile_options(lk_cpu_${isa} PRIVATE ${LK_FLAGS_${isa}})
  target_compile_definitions(lk_cpu_${isa} PRIVATE LK_ISA=${isa})
  target_link_libraries(lk_cpu_${isa} PRIVATE lk_torch)
  set(isa_objects ${isa_objects} $<TARGET_OBJECTS:lk_cpu_${isa}> PARENT_SCOPE)
endfunction()
foreach(isa ${LK_ISAS})
  lk_add_level(${isa} ${isa_sources})
endforeach()
if(DEFINED LK_FLAGS_amx AND amx_sources)
  lk_add_level(amx ${amx_sources})
endif()

add_library(_ops_cpu MODULE ${cpu_bindings} ${cpu_sources} ${isa_objects})
# Linked by name: torch has loaded its own libtorch_cpu.so before, and that one is found again.
target_link_libraries(_ops_cpu PRIVATE lk_torch ${LK_TORCH_DIR}/lib/libtorch_cpu${CMAKE_SHARED_LIBRARY_SUFFIX})
set_target_properties(_ops_cpu PROPERTIES PREFIX "" SUFFIX ".so" SKIP_BUILD_RPATH ON)
