// What GPTQ and coordinate descent do between two matrix products: a panel of columns is rounded one after the other,
// and each moves the ones after it. Rows never meet, so a warp has a row of the weight and each of its lanes four columns.
//
//   round_panel  GPTQ: column i becomes its error over U_ii, later columns j lose U_ij times that
//   move_panel   descent: column i moves to the code that is best with all others held, which turns the gradient of
//                later columns j by H_ij times the step
//
// A panel is (count, rows) fp32, a column of the weight to a row. `local` is the panel's part of U or H, `stride` floats
// from row to row. Scales are one per row of the weight (pitch 0), or one per element (pitch rows).

#include "numbers.cuh"

constexpr int columns = 128;
constexpr int lane_columns = columns / 32;
constexpr int warps = 8;
constexpr unsigned all_lanes = 0xFFFFFFFFu;
constexpr bool is_e2m1 = E2M1;

struct Code {
  int stored;
  float value;
};

// The nearest point of the grid, ties to even, saturating at its ends.
__device__ __forceinline__ Code nearest(float ratio, float low, float high) {
  if constexpr (is_e2m1) {
    unsigned code = e2m1_code(ratio);
    unsigned index = code & 7u;
    float magnitude = index < 4u ? index * 0.5f : index < 6u ? index - 2.0f : index * 2.0f - 8.0f;
    return {(int)code, code & 8u ? -magnitude : magnitude};
  } else {
    float value = fminf(fmaxf(rintf(ratio), low), high);
    return {(int)value, value};
  }
}

extern __shared__ __align__(16) unsigned char shared_bytes[];

// The panel's columns of one row as its lanes hold them: lane l has the columns l, l + 32, ...
struct Row {
  float values[lane_columns];

  __device__ __forceinline__ void load(const float* panel, int pitch, int row, int count) {
#pragma unroll
    for (int j = 0; j < lane_columns; j++) {
      int column = threadIdx.x % 32 + 32 * j;
      values[j] = column < count ? panel[(size_t)column * pitch + row] : 0.0f;
    }
  }
};

__device__ __forceinline__ float* share_local(const float* local, int stride, int count) {
  float* shared = (float*)shared_bytes;
  for (int i = threadIdx.x; i < count * columns; i += blockDim.x) {
    int row = i / columns, column = i % columns;
    shared[i] = column < count ? local[(size_t)row * stride + column] : 0.0f;
  }
  __syncthreads();
  return shared;
}

extern "C" __global__ void __launch_bounds__(32 * warps)
round_panel(float* panel, signed char* codes, const float* local, const float* scale, const float* inverse,
            int count, int rows, int stride, int pitch, float low, float high) {
  const float* factor = share_local(local, stride, count);
  int row = blockIdx.x * warps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  Row value, scales, inverses;
  value.load(panel, rows, row, count);
  scales.load(scale, pitch, row, count);
  inverses.load(inverse, pitch, row, count);
#pragma unroll
  for (int j = 0; j < lane_columns; j++) {
    for (int source = 0; source < 32 && 32 * j + source < count; source++) {
      int column = 32 * j + source;
      float x = __shfl_sync(all_lanes, value.values[j], source);
      float own = __shfl_sync(all_lanes, scales.values[j], source);
      Code code = nearest(__fmul_rn(x, __shfl_sync(all_lanes, inverses.values[j], source)), low, high);
      float error = __fdiv_rn(__fsub_rn(x, __fmul_rn(code.value, own)), factor[column * columns + column]);
      if (lane == source) {
        value.values[j] = error;
        codes[(size_t)column * rows + row] = (signed char)code.stored;
      }
#pragma unroll
      for (int k = j; k < lane_columns; k++)
        if (k > j || lane > source) value.values[k] -= error * factor[column * columns + lane + 32 * k];
    }
  }
#pragma unroll
  for (int j = 0; j < lane_columns; j++)
    if (lane + 32 * j < count) panel[(size_t)(lane + 32 * j) * rows + row] = value.values[j];
}

extern "C" __global__ void __launch_bounds__(32 * warps)
move_panel(float* values, signed char* codes, const float* gradients, const float* local, const float* scale,
           const float* inverse, int count, int rows, int stride, int pitch, float low, float high) {
  const float* hessian = share_local(local, stride, count);
  int row = blockIdx.x * warps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  Row value, gradient, scales, inverses;
  value.load(values, rows, row, count);
  gradient.load(gradients, rows, row, count);
  scales.load(scale, pitch, row, count);
  inverses.load(inverse, pitch, row, count);
#pragma unroll
  for (int j = 0; j < lane_columns; j++) {
    for (int source = 0; source < 32 && 32 * j + source < count; source++) {
      int column = 32 * j + source;
      float x = __shfl_sync(all_lanes, value.values[j], source);
      float slope = __shfl_sync(all_lanes, gradient.values[j], source);
      float own = __shfl_sync(all_lanes, scales.values[j], source);
      float best = __fsub_rn(x, __fdiv_rn(slope, hessian[column * columns + column]));
      Code code = nearest(__fmul_rn(best, __shfl_sync(all_lanes, inverses.values[j], source)), low, high);
      float moved = __fmul_rn(code.value, own), step = __fsub_rn(moved, x);
      if (lane == source) {
        value.values[j] = moved;
        codes[(size_t)column * rows + row] = (signed char)code.stored;
      }
#pragma unroll
      for (int k = j; k < lane_columns; k++)
        if (k > j || lane > source) gradient.values[k] += step * hessian[column * columns + lane + 32 * k];
    }
  }
#pragma unroll
  for (int j = 0; j < lane_columns; j++)
    if (lane + 32 * j < count) values[(size_t)(lane + 32 * j) * rows + row] = value.values[j];
}
