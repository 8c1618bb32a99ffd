// Tensor maps on the host: what TMA knows about a matrix in global memory.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "device.h"
#include "weight.h"

namespace lowbit::cuda {

// Null if the driver has none.
inline auto tensor_map_encoder() {
    static const auto encoder =
        driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled", 12000);
    return encoder;
}

inline CUtensorMapDataType tensor_map_type(Dtype dtype) {  // of the 16-bit ones
    return dtype == Dtype::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                     : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

// A thread that has not called the runtime yet, such as one of autograd's, has no context, and the
// encoder refuses it. Once a thread has one it keeps one; whose that is, is not for us to change.
inline bool thread_has_context() {
    static thread_local const bool has = [] {
        const auto current_context =
            driver_function<decltype(&cuCtxGetCurrent)>("cuCtxGetCurrent", 4000);
        CUcontext context = nullptr;
        if (current_context != nullptr && current_context(&context) == CUDA_SUCCESS &&
            context != nullptr)
            return true;
        int device = 0;
        return cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess;
    }();
    return has;
}

struct TensorMapBox {
    int rows;
    int columns;  // 32, 64 or 128 bytes of them, which decides the swizzle
};

inline cudaError_t encode_tensor_map(
    CUtensorMap& map,
    CUtensorMapDataType type,
    int axes,
    const void* data,
    const cuuint64_t* sizes,
    const cuuint64_t* strides,
    const cuuint32_t* box,
    CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion) {
    const auto encode = tensor_map_encoder();
    if (encode == nullptr)
        return cudaErrorNotSupported;
    if (!thread_has_context())
        return cudaErrorDeviceUninitialized;
    const cuuint32_t element_strides[3] = {1, 1, 1};
    const CUresult result = encode(
        &map, type, static_cast<cuuint32_t>(axes), const_cast<void*>(data), sizes, strides, box,
        element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// A row-major, contiguous matrix; reads outside give zeros. Rows take a multiple of 16 bytes.
inline cudaError_t make_tensor_map(
    CUtensorMap& map,
    CUtensorMapDataType type,
    const void* data,
    int64_t rows,
    int64_t columns,
    TensorMapBox box,
    CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
    const int element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT8    ? 1
                              : type == CU_TENSOR_MAP_DATA_TYPE_UINT32 ? 4
                                                                       : 2;
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[1] = {sizes[0] * element_bytes};
    const cuuint32_t box_sizes[2] = {
        static_cast<cuuint32_t>(box.columns), static_cast<cuuint32_t>(box.rows)};
    const int row_bytes = box.columns * element_bytes;
    const auto swizzle = row_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                         : row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                           : CU_TENSOR_MAP_SWIZZLE_32B;
    return encode_tensor_map(map, type, 2, data, sizes, strides, box_sizes, swizzle, promotion);
}

// The same of 16-bit elements as [columns / 64][rows][64]: a box is `blocks` of 64 columns, one
// behind the other. The outer axis has the smaller stride, which the driver's documentation does
// not provide for and the driver accepts (580.159, CUDA 13.0).
inline cudaError_t make_block_map(
    CUtensorMap& map,
    CUtensorMapDataType type,
    const void* data,
    int64_t rows,
    int64_t columns,
    int box_rows,
    int blocks) {
    const cuuint64_t sizes[3] = {
        64, static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(columns / 64)};
    const cuuint64_t strides[2] = {static_cast<cuuint64_t>(columns) * 2, 128};
    const cuuint32_t box[3] = {
        64, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(blocks)};
    return encode_tensor_map(
        map, type, 3, data, sizes, strides, box, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
}

}  // namespace lowbit::cuda
