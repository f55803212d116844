#include "cuda/hopper/tensor_map.hpp"

#include <cuda_runtime_api.h>

#include <string>

#include "cuda/element.hpp"
#include "sonicmoe/error.hpp"

namespace sonicmoe::cuda::hopper {
namespace {

constexpr CUtensorMapDataType kElementType = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

using Encode = decltype(&cuTensorMapEncodeTiled);

// Through the runtime, so that the library does not link the driver.
Encode find_encode() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                              12000, cudaEnableDefault, &found);
  if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) {
    throw Error(std::string("cuTensorMapEncodeTiled: the driver does not offer it (") +
                cudaGetErrorString(status) + ")");
  }
  return reinterpret_cast<Encode>(entry);
}

std::string list(std::initializer_list<std::int64_t> values) {
  std::string text;
  for (const std::int64_t v : values) text += (text.empty() ? "" : ", ") + std::to_string(v);
  return "[" + text + "]";
}

}  // namespace

CUtensorMap make_tensor_map(const void* data, std::initializer_list<std::int64_t> sizes,
                            std::initializer_list<std::int64_t> strides,
                            std::initializer_list<int> box, CUtensorMapSwizzle swizzle) {
  static const Encode encode = find_encode();
  constexpr int kMaxDims = 5;
  cuuint64_t dims[kMaxDims], byte_strides[kMaxDims];
  cuuint32_t boxes[kMaxDims], element_strides[kMaxDims];
  const auto rank = static_cast<cuuint32_t>(sizes.size());
  for (cuuint32_t i = 0; i < rank; ++i) {
    dims[i] = static_cast<cuuint64_t>(sizes.begin()[i]);
    boxes[i] = static_cast<cuuint32_t>(box.begin()[i]);
    element_strides[i] = 1;
    if (i > 0) {
      byte_strides[i - 1] = static_cast<cuuint64_t>(strides.begin()[i - 1] * kElementBytes);
    }
  }
  CUtensorMap map;
  const CUresult result =
      encode(&map, kElementType, rank, const_cast<void*>(data), dims, byte_strides, boxes,
             element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw Error("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(result)) +
                " for sizes " + list(sizes) + ", strides " + list(strides));
  }
  return map;
}

}  // namespace sonicmoe::cuda::hopper
