# The CPU backend, where oneDNN is found.
if(NOT SONICMOE_ONEDNN)
  set(SONICMOE_ABSENT "SONICMOE_ONEDNN is off")
  return()
endif()
find_package(dnnl CONFIG QUIET)
if(NOT dnnl_FOUND)
  set(SONICMOE_ABSENT "this build found no oneDNN (libdnnl-dev)")
  message(WARNING "SONICMOE: NO ONEDNN WAS FOUND. ON A CPU, LAYERS WILL BE SOME 40 TIMES SLOWER: the "
                  "float64 reference takes its place. Install it (Debian: libdnnl-dev; pip: "
                  "onednn-devel-cpu-gomp, with -Ddnnl_DIR=<prefix>/lib/cmake/dnnl), or say "
                  "-DSONICMOE_ONEDNN=OFF.")
  return()
endif()

file(GLOB SONICMOE_CPU_SOURCES CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*.cpp)
target_sources(sonicmoe PRIVATE ${SONICMOE_CPU_SOURCES})
# Lets comparisons become selects, without which no loop with one vectorises; no value changes.
set_source_files_properties(
  ${CMAKE_CURRENT_LIST_DIR}/activation.cpp ${CMAKE_CURRENT_LIST_DIR}/vec.cpp
  PROPERTIES COMPILE_OPTIONS "-fno-trapping-math;-fno-math-errno")
target_link_libraries(sonicmoe PRIVATE DNNL::dnnl)
