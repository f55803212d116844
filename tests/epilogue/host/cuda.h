// Stands in for CUDA's header of that name on the host. A tensor map of H [num_rows, parts, width],
// in boxes of four rows x parts x box_width.
#pragma once

#include <cuda_bf16.h>

struct CUtensorMap {
  const __nv_bfloat16* data;
  int num_rows, parts, width, box_width;
};
