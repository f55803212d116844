# The backend of last resort: always there.
target_sources(sonicmoe PRIVATE ${CMAKE_CURRENT_LIST_DIR}/reference_backend.cpp)
