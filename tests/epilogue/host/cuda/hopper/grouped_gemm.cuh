// Stands in for the header of that name on the host: what epilogues use of it, with an array as
// shared memory. TMA copies are recorded, and made when the lane waits for them: the k-th wait gets
// the k-th copy, as a warp's ring promises.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "cuda/hopper/tile/swizzle.cuh"
#include "cuda/ptx/math.cuh"

// Of H [num_rows, parts, width], in boxes of four rows x parts x box_width.
struct CUtensorMap {
  const __nv_bfloat16* data;
  int num_rows, parts, width, box_width;
};

namespace sonicmoe::host {

struct Copy {
  uint32_t to;
  const CUtensorMap* map;
  int column, row;
};
inline std::array<uint8_t, 1 << 20> shared;
inline std::vector<Copy> copies;  // of one warp, in order
inline std::size_t waits;         // of one lane

// What load_global_nc_v4() may read.
struct Readable {
  const __nv_bfloat16 *begin, *end;
};
inline Readable readable;

// Zeros where the box is past the end.
inline void make_copy(const Copy& copy) {
  const CUtensorMap& m = *copy.map;
  uint8_t* to = shared.data() + copy.to;
  for (int row = copy.row; row < copy.row + 4; ++row) {
    for (int part = 0; part < m.parts; ++part) {
      for (int c = copy.column; c < copy.column + m.box_width; ++c, to += 2) {
        const bool inside = row < m.num_rows && c < m.width;
        const __nv_bfloat16 zero{};
        std::memcpy(to, inside ? m.data + (row * m.parts + part) * m.width + c : &zero, 2);
      }
    }
  }
}

inline void require_aligned(std::uintptr_t address, unsigned bytes) {
  if (address % bytes != 0) throw std::runtime_error("misaligned access");
}
template <class T>
T load(uint32_t address) {
  require_aligned(address, sizeof(T));
  T value;
  std::memcpy(&value, &shared.at(address), sizeof(T));
  return value;
}
template <class T>
void store(void* address, const T& value) {
  require_aligned(reinterpret_cast<std::uintptr_t>(address), sizeof(T));
  std::memcpy(address, &value, sizeof(T));
}

}  // namespace sonicmoe::host

namespace sonicmoe::ptx {

inline uint4 load_shared_v4(uint32_t address) { return host::load<uint4>(address); }
inline uint2 load_shared_v2(uint32_t address) { return host::load<uint2>(address); }
inline uint4 load_global_nc_v4(const void* address) {
  uint4 value;
  const auto* first = static_cast<const __nv_bfloat16*>(address);
  if (first < host::readable.begin || first + 8 > host::readable.end) {
    throw std::runtime_error("read out of bounds");
  }
  host::require_aligned(reinterpret_cast<std::uintptr_t>(address), sizeof(value));
  std::memcpy(&value, address, sizeof(value));
  return value;
}
inline void store_global_v4(void* address, const uint4& v) { host::store(address, v); }
inline void store_global_streaming_v4(void* address, const uint4& v) { host::store(address, v); }
inline void store_global_v2(void* address, uint32_t x, uint32_t y) {
  host::store(address, uint2{x, y});
}
inline void reduce_add_bf16x2_v4(void*, const uint4&) {}  // store.cuh names it; not called here
inline void await_value(uint32_t) {}

inline void mbarrier_init(uint32_t, int) {}
inline void mbarrier_arrive_expect_tx(uint32_t, int) {}
inline void fence_mbarrier_init() {}
inline void prefetch_tensormap(const CUtensorMap*) {}
inline void tma_load(uint32_t to, const CUtensorMap* map, uint32_t, int column, int, int row) {
  host::copies.push_back({to, map, column, row});  // lane 0 issues them for all lanes
}
inline void tma_store(const CUtensorMap*, uint32_t, int, int, int) {}  // likewise

}  // namespace sonicmoe::ptx

namespace sonicmoe::tile {

enum class Role { kEpilogue };
enum class Slot { kHidden };
template <int kStages>
struct RingState {
  uint32_t stage = 0, parity = 0;
  void advance() { stage = (stage + 1) % kStages; }
};
inline void wait(uint32_t, uint32_t, Role, Slot, uint32_t) {
  host::make_copy(host::copies.at(host::waits++));
}

}  // namespace sonicmoe::tile

namespace sonicmoe::cuda::hopper {

using bf16 = __nv_bfloat16;
using tile::Role;
using tile::Slot;
enum class Dump { kRows, kTransposed, kDirect };
inline constexpr int kBlockM = 128;
struct SharedLayout {
  uint32_t extra = 0, extra_barriers = 0;  // barriers are not read
};
struct Item {
  int row0, rows, expert, m, n, k_tiles;
};

}  // namespace sonicmoe::cuda::hopper
