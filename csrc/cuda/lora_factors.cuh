// Low-rank factors as the kernels of the backward pass read them: in their 16-bit type T, with rows
// as long as TMA wants them.
#pragma once

#include "common.cuh"
#include "launch_config.h"
#include "ptx_sm90.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kCopyThreads = 256;

// A copy [rows, columns] in T of a factor [rows, from_columns] in T or fp32, zeros behind it; or
// one that is transposed, [columns, rows].
struct FactorCopy {
    const void* from;
    bool is_float;
    int64_t rows;
    int64_t from_columns, columns;
    void* to;
};

template <typename T>
__device__ __forceinline__ T factor_element(const FactorCopy& c, int64_t row, int64_t column) {
    const int64_t at = row * c.from_columns + column;
    if (column >= c.from_columns)
        return from_float<T>(0.0f);
    return c.is_float ? from_float<T>(static_cast<const float*>(c.from)[at])
                      : static_cast<const T*>(c.from)[at];
}

template <typename T>
__device__ __forceinline__ void copy_element(const FactorCopy& c, int64_t i) {
    if (i >= c.rows * c.columns)
        return;
    const int64_t row = i / c.columns;
    static_cast<T*>(c.to)[i] = factor_element<T>(c, row, i - row * c.columns);
}

// Into L2; short rows, a line each.
__device__ __forceinline__ void prefetch_row(const FactorCopy& c, int64_t row) {
    prefetch_l2(static_cast<const uint8_t*>(c.from) + row * c.from_columns * (c.is_float ? 4 : 2));
}

// All loads before the stores, so that they are in flight together.
template <typename T, int kColumns, typename From>
__device__ __forceinline__ void
copy_row_transposed(const From* from, int columns, T* to, int64_t stride) {
    T values[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; j++)
        values[j] = from_float<T>(j < columns ? to_float(from[j]) : 0.0f);
#pragma unroll
    for (int j = 0; j < kColumns; j++)
        to[j * stride] = values[j];
}

// A row of [rows, kColumns] to a column of [kColumns, rows].
template <typename T, int kColumns>
__device__ __forceinline__ void copy_row_transposed(const FactorCopy& c, int64_t row) {
    const int columns = static_cast<int>(c.from_columns);
    const int64_t at = row * c.from_columns;
    T* to = static_cast<T*>(c.to) + row;
    if (c.is_float)
        copy_row_transposed<T, kColumns>(
            static_cast<const float*>(c.from) + at, columns, to, c.rows);
    else
        copy_row_transposed<T, kColumns>(static_cast<const T*>(c.from) + at, columns, to, c.rows);
}

struct FactorCopies {
    FactorCopy copy[3];
};

template <typename T>
__global__ void __launch_bounds__(kCopyThreads)
    copy_factors_kernel(const __grid_constant__ FactorCopies copies) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    int64_t i = blockIdx.x * int64_t{kCopyThreads} + threadIdx.x;
#pragma unroll
    for (const FactorCopy& c : copies.copy) {
        if (i >= 0)
            copy_element<T>(c, i);
        i -= c.rows * c.columns;
    }
}

// One launch for all; those without rows are skipped.
template <typename T>
cudaError_t copy_factors(const FactorCopies& copies, cudaStream_t stream) {
    int64_t elements = 0;
    for (const FactorCopy& c : copies.copy)
        elements += c.rows * c.columns;
    if (elements == 0)
        return cudaSuccess;
    LaunchConfig config(
        static_cast<unsigned>(ceil_div(elements, kCopyThreads)), kCopyThreads, 0, stream);
    return cudaLaunchKernelEx(config.get(), copy_factors_kernel<T>, copies);
}

}  // namespace
}  // namespace lowbit::cuda
