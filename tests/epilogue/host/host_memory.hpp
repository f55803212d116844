// The memory that the stand-ins of ptx/ read and write: an array as shared memory. TMA copies are
// recorded, and made when the lane waits for them: the k-th wait gets the k-th copy, as a warp's
// ring promises.
#pragma once

#include <cuda.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

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
