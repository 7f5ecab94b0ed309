// What stands between two products that stay in 16 bits: (residual add +) RMSNorm of rows, and SiLU(gate) * up.
// Rounds wherever torch would hold a tensor, so that it gives what transformers' modules give.

#include "chain.cuh"
#include "numbers.cuh"

using Number = INPUT;                // bf16 or fp16
constexpr int chunks = CHUNKS;       // 16-byte chunks of a row that a thread keeps
constexpr bool has_residual = RESIDUAL;
constexpr bool weight_ahead = chunks <= 2;  // of longer rows registers hold the numbers alone
constexpr int width = 8;             // numbers in a chunk
constexpr unsigned all_lanes = 0xFFFFFFFFu;

struct alignas(16) Chunk {
  Number values[width];
};

__device__ __forceinline__ float sum_over_block(float value) {
  __shared__ float partial_sums[32];
  for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(all_lanes, value, distance);
  if (blockDim.x == 32) return value;
  if (threadIdx.x % 32 == 0) partial_sums[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
  for (int warp = 0; warp < blockDim.x / 32; warp++) sum += partial_sums[warp];
  return sum;
}

// One block per row; row r is part r % parts of row r / parts of the input, whose rows lie `stride` numbers apart.
extern "C" __global__ void __launch_bounds__(1024, 1) add_norm(const Number* x, const Number* residual, const Number* weight, Number* total, Number* normed,
                                    int channels, int parts, int stride, float epsilon) {
  const int row_chunks = channels / width;
  const Number* source = x + (long long)(blockIdx.x / parts) * stride + (blockIdx.x % parts) * channels;
  const long long start = (long long)blockIdx.x * channels;
  Chunk weights[weight_ahead ? chunks : 1], rows[chunks];
#pragma unroll
  for (int i = 0; i < chunks; i++) {
    const int chunk = threadIdx.x + i * blockDim.x;
    if (weight_ahead && chunk < row_chunks) weights[i] = reinterpret_cast<const Chunk*>(weight)[chunk];
  }
  allow_next_kernel();
  wait_for_previous_kernel();
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < chunks; i++) {
    const int chunk = threadIdx.x + i * blockDim.x;
    if (chunk >= row_chunks) continue;
    rows[i] = reinterpret_cast<const Chunk*>(source)[chunk];
    if (has_residual) {
      const Chunk other = reinterpret_cast<const Chunk*>(residual + start)[chunk];
      for (int j = 0; j < width; j++) rows[i].values[j] = from_float<Number>(to_float(rows[i].values[j]) + to_float(other.values[j]));
      reinterpret_cast<Chunk*>(total + start)[chunk] = rows[i];
    }
    for (int j = 0; j < width; j++) squares += to_float(rows[i].values[j]) * to_float(rows[i].values[j]);
  }
  const float inverse = rsqrtf(sum_over_block(squares) / (float)channels + epsilon);
#pragma unroll
  for (int i = 0; i < chunks; i++) {
    const int chunk = threadIdx.x + i * blockDim.x;
    if (chunk >= row_chunks) continue;
    const Chunk scales = weight_ahead ? weights[weight_ahead ? i : 0] : reinterpret_cast<const Chunk*>(weight)[chunk];
    for (int j = 0; j < width; j++) {
      const float value = rounded<Number>(to_float(rows[i].values[j]) * inverse);
      rows[i].values[j] = from_float<Number>(value * to_float(scales.values[j]));
    }
    reinterpret_cast<Chunk*>(normed + start)[chunk] = rows[i];
  }
}

// One thread per chunk; gate and up are rows that lie `stride` numbers apart, the result is contiguous.
extern "C" __global__ void silu_mul(const Number* gate, const Number* up, Number* result, int channels, int stride, int rows) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int row_chunks = channels / width;
  const long long item = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (item >= (long long)rows * row_chunks) return;
  const long long source = item / row_chunks * stride + item % row_chunks * width;
  const Chunk gates = *reinterpret_cast<const Chunk*>(gate + source), ups = *reinterpret_cast<const Chunk*>(up + source);
  Chunk products;
  for (int j = 0; j < width; j++) {
    const float value = to_float(gates.values[j]);
    const float activated = rounded<Number>(__fdiv_rn(value, 1.0f + expf(-value)));
    products.values[j] = from_float<Number>(activated * to_float(ups.values[j]));
  }
  reinterpret_cast<Chunk*>(result)[item] = products;
}
