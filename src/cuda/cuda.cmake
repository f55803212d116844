# The CUDA backend, where a CUDA compiler is found. A spill, registers that setmaxnreg cannot move, or
# products that ptxas serialises fail the build.
if(NOT SONICMOE_CUDA)
  set(SONICMOE_ABSENT "built without CUDA (SONICMOE_CUDA is off)")
  return()
endif()
if(SONICMOE_CUDA_OBJECTS)
  find_package(CUDAToolkit REQUIRED)
  file(GLOB_RECURSE SONICMOE_CUDA_SOURCES ${SONICMOE_CUDA_OBJECTS}/*.o)
  if(NOT SONICMOE_CUDA_SOURCES)
    message(FATAL_ERROR "SONICMOE_CUDA_OBJECTS: ${SONICMOE_CUDA_OBJECTS} holds no object files")
  endif()
  target_sources(sonicmoe PRIVATE ${SONICMOE_CUDA_SOURCES})
  target_link_libraries(sonicmoe PRIVATE CUDA::cudart_static)
  return()
endif()
include(CheckLanguage)
set(CMAKE_CUDA_ARCHITECTURES OFF)  # -gencode is given below; CMake's own names do not reach every version
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  set(SONICMOE_ABSENT "built without CUDA (no nvcc was found)")
  return()
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

file(GLOB SONICMOE_CUDA_SOURCES CONFIGURE_DEPENDS
  ${CMAKE_CURRENT_SOURCE_DIR}/cuda/*.cpp ${CMAKE_CURRENT_SOURCE_DIR}/cuda/*/*.cpp
  ${CMAKE_CURRENT_SOURCE_DIR}/cuda/*/*.cu)

# A folder with a family.cmake is a family of kernels, compiled for the GPUs that it names. What the
# families share, the tests and the laboratory are compiled for all of them: SONICMOE_CUDA_GENCODE.
file(GLOB SONICMOE_FAMILIES CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/cuda/*/family.cmake)
set(SONICMOE_CUDA_GENCODE "")
set(SONICMOE_SHARED_KERNELS ${SONICMOE_CUDA_SOURCES})
list(FILTER SONICMOE_SHARED_KERNELS INCLUDE REGEX "\\.cu$")
foreach(family IN LISTS SONICMOE_FAMILIES)
  include(${family})
  get_filename_component(folder ${family} DIRECTORY)
  file(GLOB kernels CONFIGURE_DEPENDS ${folder}/*.cu)
  set_source_files_properties(${kernels} PROPERTIES COMPILE_OPTIONS "${SONICMOE_FAMILY_GENCODE}")
  list(REMOVE_ITEM SONICMOE_SHARED_KERNELS ${kernels})
  list(APPEND SONICMOE_CUDA_GENCODE ${SONICMOE_FAMILY_GENCODE})
endforeach()
list(REMOVE_DUPLICATES SONICMOE_CUDA_GENCODE)
set_source_files_properties(${SONICMOE_SHARED_KERNELS} PROPERTIES
  COMPILE_OPTIONS "${SONICMOE_CUDA_GENCODE}")
set(SONICMOE_CUDA_GENCODE "${SONICMOE_CUDA_GENCODE}" CACHE INTERNAL "nvcc's -gencode options")

target_sources(sonicmoe PRIVATE ${SONICMOE_CUDA_SOURCES})
set_target_properties(sonicmoe PROPERTIES CUDA_VISIBILITY_PRESET hidden CUDA_ARCHITECTURES OFF
  CUDA_COMPILER_LAUNCHER "${CMAKE_CURRENT_SOURCE_DIR}/cuda/strict_nvcc.sh")
target_compile_options(sonicmoe PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20>)
if(SONICMOE_CUDA_STRESS)  # hopper/tile/pipeline.cuh, whose pauses may spill
  target_compile_definitions(sonicmoe PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:SONICMOE_STRESS>)
else()
  target_compile_options(sonicmoe PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=--warn-on-spills,--warning-as-error>)
endif()
target_include_directories(sonicmoe SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
target_link_libraries(sonicmoe PRIVATE CUDA::cudart_static)
set_property(GLOBAL PROPERTY SONICMOE_HAS_CUDA ON)
