# The CUDA backend, where a CUDA compiler is found. A spill, registers that setmaxnreg cannot move, or
# products that ptxas serialises fail the build.
if(NOT SONICMOE_CUDA)
  set(SONICMOE_ABSENT "SONICMOE_CUDA is off")
  return()
endif()
include(CheckLanguage)
set(CMAKE_CUDA_ARCHITECTURES OFF)  # sm_90a is given below; CMake's own names do not reach every version
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  set(SONICMOE_ABSENT "this build found no nvcc")
  return()
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

file(GLOB SONICMOE_CUDA_SOURCES CONFIGURE_DEPENDS
  ${CMAKE_CURRENT_SOURCE_DIR}/cuda/*.cpp ${CMAKE_CURRENT_SOURCE_DIR}/cuda/*/*.cpp
  ${CMAKE_CURRENT_SOURCE_DIR}/cuda/*/*.cu)
target_sources(sonicmoe PRIVATE ${SONICMOE_CUDA_SOURCES})
set_target_properties(sonicmoe PROPERTIES CUDA_VISIBILITY_PRESET hidden CUDA_ARCHITECTURES OFF
  CUDA_COMPILER_LAUNCHER "${CMAKE_CURRENT_SOURCE_DIR}/cuda/strict_nvcc.sh")
target_compile_options(sonicmoe PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:
  -std=c++20 -gencode=arch=compute_90a,code=sm_90a -Xptxas=--warn-on-spills,--warning-as-error>)
if(SONICMOE_CUDA_STRESS)  # hopper/tile/pipeline.cuh
  target_compile_definitions(sonicmoe PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:SONICMOE_STRESS>)
endif()
target_include_directories(sonicmoe PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
target_link_libraries(sonicmoe PRIVATE CUDA::cudart_static)
set_property(GLOBAL PROPERTY SONICMOE_HAS_CUDA ON)
