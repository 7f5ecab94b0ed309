// Quantizes the inputs of many tokens, in 16 bits, and writes them as the operand that the GEMM reads: a CTA takes two
// tokens after two others, and the next ones' rows are on their way meanwhile. The steps are those of quantize_rows.cuh. Two
// tokens lie interleaved in shared memory, a word for both of each channel, so that one gather serves both.

#include "chain.cuh"
#include "mma_sync.cuh"
#include "pairs.cuh"
#include "quantize_transform.cuh"

constexpr int rounds = ROUNDS;  // of two rows that are on their way
constexpr int inputs = prologue == ADD_NORM || prologue == SILU_MUL ? 2 : 1;
constexpr int width = 8;   // channels in 16 bytes of a row
constexpr int chunks = 2;  // of 16 bytes, of each row, that a thread stages; lanes have 16 channels each
constexpr int warps = THREADS / 32;
using Both = Pair<Input>;
static_assert(channels_per_lane == 16 && sizeof(Index) == 2 && aligned, "what kernels/quantize.py asks for");

struct Shared {
  float sums[2][32];           // of each token and warp, of the squares of a row
  unsigned absmax[2][2][32];   // of each token, of its body and its outliers, as ordered integers
};

// ---------------------------------------------------------------------------------------------------- stage

// Rows as they come: a thread reads what it has copied itself, so that nobody waits for others. Missing tokens are zeros.
struct Incoming {
  const Input *x, *other;
  unsigned char* memory;
  int tokens, channels, x_stride, other_stride;

  __device__ __forceinline__ unsigned char* row(int round, int which, int t) const {
    return memory + (size_t)((round * inputs + which) * 2 + t) * channels * sizeof(Input);
  }

  __device__ __forceinline__ void copy(int round, int first_token) const {
#pragma unroll 1
    for (int t = 0; t < 2; t++) {
      const bool exists = first_token + t < tokens;
      const size_t token = exists ? first_token + t : 0;
#pragma unroll 1
      for (int at = threadIdx.x * width; at < channels; at += THREADS * width) {
        copy_async(row(round, 0, t) + at * sizeof(Input), x + token * x_stride + at, exists);
        if (inputs == 2) copy_async(row(round, 1, t) + at * sizeof(Input), other + token * other_stride + at, exists);
      }
    }
    copy_commit();  // an empty group too: groups are counted
  }

  __device__ __forceinline__ uint4 take(int round, int which, int t, int at) const {
    return *reinterpret_cast<const uint4*>(row(round, which, t) + at * sizeof(Input));
  }
};

// Of interleaved rows: two planes, of the channels whose number has bit 2 clear and set, so that neighbouring threads, which
// store two groups of four channels each, write neighbouring words. Behind the first comes the zero of padding channels.
struct Staged {
  unsigned char* memory;
  int plane;  // bytes

  __device__ __forceinline__ unsigned place(int channel) const { return channel / width * 16 + channel % 4 * 4 + (channel & 4 ? plane : 0); }
  __device__ __forceinline__ void store(int at, const unsigned (&words)[width]) const {
    *reinterpret_cast<uint4*>(memory + at * 2) = make_uint4(words[0], words[1], words[2], words[3]);
    *reinterpret_cast<uint4*>(memory + plane + at * 2) = make_uint4(words[4], words[5], words[6], words[7]);
  }
};

struct Words {
  unsigned of[width / 2];  // two channels of one token each

  Words() = default;
  __device__ __forceinline__ Words(uint4 chunk) : of{chunk.x, chunk.y, chunk.z, chunk.w} {}
  __device__ __forceinline__ uint4 chunk() const { return make_uint4(of[0], of[1], of[2], of[3]); }
};

__device__ __forceinline__ void interleave(unsigned (&words)[width], const Words& first, const Words& second) {
#pragma unroll
  for (int i = 0; i < width / 2; i++) {
    words[2 * i] = permute_bytes(first.of[i], second.of[i], 0x5410);
    words[2 * i + 1] = permute_bytes(first.of[i], second.of[i], 0x7632);
  }
}

__device__ __forceinline__ Words silu_mul(const Words& gate, const Words& up) {
  Words product;
#pragma unroll
  for (int i = 0; i < width / 2; i++)
    product.of[i] = Both::multiply(Both::of(silu(Both::first(gate.of[i])), silu(Both::second(gate.of[i]))), up.of[i]);
  return product;
}

// Both tokens' channels times their norms' inverse and the weight, rounded where transformers' RMSNorm rounds.
__device__ __forceinline__ void normalize(unsigned (&words)[width], const Words& first, const Words& second, const Words& weight, const float (&inverse)[2],
                                          int unit_offset) {
#pragma unroll
  for (int i = 0; i < width; i++) {
    const unsigned a = first.of[i / 2], b = second.of[i / 2], scale = weight.of[i / 2];
    const float low = (i % 2 ? Both::second(a) : Both::first(a)) * inverse[0], high = (i % 2 ? Both::second(b) : Both::first(b)) * inverse[1];
    if (unit_offset) {  // Gemma keeps fp32 up to the product and stores its weights minus one
      const float factor = 1.0f + (i % 2 ? Both::second(scale) : Both::first(scale));
      words[i] = Both::of(low * factor, high * factor);
    } else {
      words[i] = Both::multiply(Both::of(low, high), permute_bytes(scale, 0, i % 2 ? 0x3232 : 0x1010));
    }
  }
}

// The sums of both tokens over the CTA.
__device__ __forceinline__ void sum_over_cta(float (&sums)[2], Shared* shared, int thread) {
#pragma unroll
  for (int t = 0; t < 2; t++) {
    for (int distance = 16; distance; distance /= 2) sums[t] += __shfl_xor_sync(all_lanes, sums[t], distance);
    if (thread % 32 == 0) shared->sums[t][thread / 32] = sums[t];
  }
  __syncthreads();
#pragma unroll
  for (int t = 0; t < 2; t++) {
    sums[t] = thread % 32 < warps ? shared->sums[t][thread % 32] : 0.0f;
    for (int distance = 16; distance; distance /= 2) sums[t] += __shfl_xor_sync(all_lanes, sums[t], distance);
  }
}

// What the layer's input is, if it is wanted.
struct Outputs {
  Input *residual, *row;
  int first_token, tokens, channels;

  __device__ __forceinline__ void store(Input* to, int t, int at, const Words& words) const {
    if (first_token + t < tokens) *reinterpret_cast<uint4*>(to + (size_t)(first_token + t) * channels + at) = words.chunk();
  }
};

__device__ __forceinline__ void stage(int thread, const Staged& staged, const Incoming& incoming, int round, Shared* shared, const Outputs& outputs,
                                      const Input* norm_weight, float epsilon, int unit_offset) {
  const int channels = incoming.channels;
  Words rows[chunks][2];
  float squares[2] = {};
#pragma unroll
  for (int i = 0; i < chunks; i++) {
    const int at = (thread + i * THREADS) * width;
    if (at >= channels) continue;
#pragma unroll
    for (int t = 0; t < 2; t++) {
      Words& words = rows[i][t] = incoming.take(round, 0, t, at);
      if (prologue == SILU_MUL) {
        words = silu_mul(words, incoming.take(round, 1, t, at));
        if (outputs.row) outputs.store(outputs.row, t, at, words);
      }
      if (prologue == ADD_NORM) {
        const Words other = incoming.take(round, 1, t, at);
#pragma unroll
        for (int j = 0; j < width / 2; j++) words.of[j] = Both::add(words.of[j], other.of[j]);
        outputs.store(outputs.residual, t, at, words);
      }
#pragma unroll
      for (int j = 0; j < width / 2 && has_norm; j++) {
        const float first = Both::first(words.of[j]), second = Both::second(words.of[j]);
        squares[t] += first * first;
        squares[t] += second * second;
      }
    }
    if (has_norm) continue;
    unsigned both[width];
    interleave(both, rows[i][0], rows[i][1]);
    staged.store(at, both);
  }
  if (!has_norm) return;
  sum_over_cta(squares, shared, thread);
  const float inverse[2] = {rsqrtf(squares[0] / (float)channels + epsilon), rsqrtf(squares[1] / (float)channels + epsilon)};
#pragma unroll
  for (int i = 0; i < chunks; i++) {
    const int at = (thread + i * THREADS) * width;
    if (at >= channels) continue;
    unsigned both[width];
    const Words weight = *reinterpret_cast<const uint4*>(norm_weight + at);
    normalize(both, rows[i][0], rows[i][1], weight, inverse, unit_offset);
    staged.store(at, both);
    if (outputs.row) {
#pragma unroll
      for (int t = 0; t < 2; t++) {
        Words words;
#pragma unroll
        for (int j = 0; j < width / 2; j++) words.of[j] = permute_bytes(both[2 * j], both[2 * j + 1], t ? 0x7632 : 0x5410);
        outputs.store(outputs.row, t, at, words);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------ transform

// Where a lane's channels lie in the staged rows, and which of them change their sign: the same for all tokens. Places wait
// in shared memory, two to a word, for the values need the registers.
struct Sources {
  uint4 (*places)[THREADS];  // two for each thread
  unsigned signs;            // bit i of both halves: of channel i

  __device__ __forceinline__ Sources(const Index* table, uint4 (*places)[THREADS], const Staged& staged, int block, int position, const Shape& shape)
      : places(places), signs(0) {
    if (!has_table || block >= shape.blocks) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      unsigned words[4];
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const unsigned index = table[block * block_channels + position + half * 8 + i], place = staged.place(index & (sign_bit - 1));
        words[i / 2] = i % 2 ? words[i / 2] | place << 16 : place;
        signs |= (index >> 15) * 0x10001u << (half * 8 + i);
      }
      places[half][threadIdx.x] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }

  // A word for both tokens of each channel.
  __device__ __forceinline__ void gather(unsigned (&words)[channels_per_lane], const Staged& staged) const {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint4 four = places[half][threadIdx.x];
      const unsigned pairs[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const unsigned place = i % 2 ? pairs[i / 2] >> 16 : pairs[i / 2] & 0xFFFFu;
        words[half * 8 + i] = *reinterpret_cast<const unsigned*>(staged.memory + place) ^ (signs << (15 - half * 8 - i) & 0x80008000u);
      }
    }
  }
};

// The same where channels keep their order. Whole groups of four exist or don't.
__device__ __forceinline__ void take_in_order(unsigned (&words)[channels_per_lane], const Staged& staged, int block, int position, const Shape& shape) {
  const int exist = channels_of(block, shape) - position, first = first_channel(block, shape) + position;
#pragma unroll
  for (int i = 0; i < channels_per_lane; i += 4) {
    const uint4 four = i < exist ? *reinterpret_cast<const uint4*>(staged.memory + staged.place(first + i)) : make_uint4(0, 0, 0, 0);
    words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
  }
}

// --------------------------------------------------------------------------------------------------- kernel

// Arguments as those of quantize_activations.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
quantize_pairs(const Input* x, const Input* other, const Input* norm_weight, const Index* table, Input* residual_out, Input* row_out,
               unsigned char* operand, unsigned char* outlier_operand, float* token_scale, float* outlier_scale, unsigned char* group_scales,
               int tokens, int padded_tokens, int channels, int body, int x_stride, int other_stride, float clip, float token_factor,
               float group_factor, float epsilon, int unit_offset) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  Shared* shared = reinterpret_cast<Shared*>(shared_bytes);
  auto* places = reinterpret_cast<uint4(*)[THREADS]>(shared + 1);
  const Staged staged = {reinterpret_cast<unsigned char*>(places + 2), channels * 2 + 16};
  const Incoming incoming = {x, other, staged.memory + 2 * staged.plane, tokens, channels, x_stride, other_stride};
  const Shape shape(channels, body);
  int block = threadIdx.x / lanes_per_block, position = threadIdx.x % lanes_per_block * channels_per_lane;

  allow_next_kernel();
  Sources sources(table, places, staged, block, position, shape);
  if (threadIdx.x == 0) *reinterpret_cast<unsigned*>(staged.memory + staged.place(channels)) = 0;
  const Operand to = {operand, outlier_operand, token_scale, outlier_scale, group_scales, padded_tokens};
  const Factors factors = {clip, token_factor, group_factor};
  wait_for_previous_kernel();
  const int step = gridDim.x * 2;
  int first_token = blockIdx.x * 2, round = 0;
  for (int i = 0; i < rounds; i++) incoming.copy(i, first_token + i * step);
#pragma unroll 1
  for (; first_token < padded_tokens; first_token += step) {
    int thread = threadIdx.x;
    asm volatile("" : "+r"(block), "+r"(position), "+r"(thread), "+r"(sources.signs));
    copy_wait<rounds - 1>();
    stage(thread, staged, incoming, round, shared, {residual_out, row_out, first_token, tokens, channels}, norm_weight, epsilon, unit_offset);
    __syncthreads();
    incoming.copy(round, first_token + rounds * step);
    round = round + 1 == rounds ? 0 : round + 1;

    Values values[2];
    {
      unsigned words[channels_per_lane] = {};
      if (block < shape.blocks) {
        if (has_table) sources.gather(words, staged);
        else take_in_order(words, staged, block, position, shape);
      }
#pragma unroll
      for (int i = 0; i < channels_per_lane; i++) values[0][i] = Both::first(words[i]), values[1][i] = Both::second(words[i]);
    }
    Range ranges[2];
#pragma unroll
    for (int t = 0; t < 2; t++) {
      rotate(values[t], block, position, shape);
      ranges[t] = group_range(values[t]);
      const float reach = absmax_of(ranges[t]);
      share_absmax(shared->absmax[t][0], block < shape.body_blocks ? reach : 0.0f);
      share_absmax(shared->absmax[t][1], block < shape.body_blocks ? 0.0f : reach);
    }
    __syncthreads();
    asm volatile("" : "+r"(block), "+r"(position));
#pragma unroll
    for (int t = 0; t < 2; t++) {
      const int token = first_token + t;
      const float body_scale = token_scale_of(shared_absmax(shared->absmax[t][0]), factors);
      const float outlier_scale = __fmul_rn(shared_absmax(shared->absmax[t][1]), per_int8);
      if (threadIdx.x == 0) token_scale[token] = body_scale, to.outlier_scale[token] = outlier_scale;
      const float inverse = reciprocal_or_zero(block < shape.body_blocks ? body_scale : outlier_scale);
      if (block < shape.blocks) encode(to, values[t], ranges[t], {body_scale, inverse, inverse}, factors, shape, block, position, token);
    }
  }
}
