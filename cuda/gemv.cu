// A linear layer for a single token, from the 16-bit row before it to its output: (residual add +) RMSNorm or SiLU(gate) * up,
// quantization and the product in one kernel. With one token a product lasts as long as its weights take to be read, if
// they are read all the time; so every block quantizes the whole row for itself, while its first weights are on their way,
// instead of waiting for a kernel that does it once.
//
// A block owns slices of 16 output channels, its warps share their pieces: 1 KB of a slice, 128 channels of 4-bit weights or
// 64 of 8-bit ones, in the fragment order that the GEMM reads (unpack.cuh). Each warp has a ring of its own, filled by
// asynchronous copies; a lane multiplies the bytes it copied itself. Sums are integers, so that their order is free and the
// result is the GEMM's to the last bit.
//
// GATED: the channels are those of a gate and of as many ups under it; a block owns the same slices of both, and what it puts
// out is silu(gate) * up, rounded wherever the GEMM and the next layer's quantization would round.
//
// WEIGHT_BITS and STAGES (pieces in a warp's ring) come beside the parameters of quantize_rows.cuh.

#include "quantize_rows.cuh"

#include "dot.cuh"
#include "mma_sync.cuh"
#include "promote.cuh"
#include "unpack.cuh"

constexpr int warps = THREADS / 32;
constexpr int slice_rows = 16, slices_of_group = BLOCK_ROWS / slice_rows;
constexpr int multiplier_bytes = WEIGHT_BITS == 4 ? slice_rows : 0;
constexpr int piece_bytes = 1024 + multiplier_bytes;
constexpr int block_bytes = WEIGHT_BITS == 4 ? INT4_BLOCK_BYTES : INT8_BLOCK_BYTES;
constexpr int pieces_of_block = WEIGHT_BITS == 4 ? 1 : 2;  // of a slice
constexpr int piece_runs = 2048;  // a piece lies in two runs of 512 bytes, so far apart

struct Weights {
    const uint8 *body, *outliers;  // [row group][block][block_bytes], [row group][INT8_BLOCK_BYTES] or null
    int blocks;

    INLINE int body_pieces() const { return blocks * pieces_of_block; }
    INLINE int pieces() const { return body_pieces() + (outliers ? 2 : 0); }
};

// The slices of a block, numbered 0 ... count - 1; of a gate and its ups, the gate's come first.
struct Slices {
    int first, count, apart;  // `apart`: from a slice of the gate to that of its ups

    INLINE Slices(int rows) {
        const int all = (rows + slice_rows - 1) / slice_rows / (GATED + 1);
        first = static_cast<int>(static_cast<long long>(all) * blockIdx.x / gridDim.x);
        count = (static_cast<int>(static_cast<long long>(all) * (blockIdx.x + 1) / gridDim.x) - first) * (GATED + 1);
        apart = all;
    }

    INLINE int operator[](int number) const {
        const int of_gate = count / 2;
        return GATED && number >= of_gate ? first + apart + number - of_gate : first + number;
    }
};

// One warp's walk over the pieces of its block's slices: every warps-th of them.
struct Walk {
    int slice, piece;

    INLINE explicit Walk(const Weights& weights) : slice(0), piece(threadIdx.x / 32) { wrap(weights); }

    INLINE void advance(const Weights& weights) {
        piece += warps;
        wrap(weights);
    }

    INLINE void wrap(const Weights& weights) {
        for (; piece >= weights.pieces(); piece -= weights.pieces()) ++slice;
    }

    INLINE bool at_outliers(const Weights& weights) const { return piece >= weights.body_pieces(); }
};

// Where a piece lies: this lane's 16 bytes of its first run, and for nibbles the slice's multipliers.
struct Source {
    const uint8 *run, *multipliers;

    INLINE Source(const Weights& weights, const Walk& walk, const Slices& slices) {
        const int slice = slices[walk.slice], group = slice / slices_of_group, part = slice % slices_of_group;
        const bool outliers = walk.at_outliers(weights);
        const int piece = outliers ? walk.piece - weights.body_pieces() : walk.piece;
        const bool nibbles = WEIGHT_BITS == 4 && !outliers;
        const uint8* block = outliers ? weights.outliers + static_cast<long long>(group) * INT8_BLOCK_BYTES
                                      : weights.body + (static_cast<long long>(group) * weights.blocks + piece / pieces_of_block) * block_bytes;
        run = block + (nibbles ? 0 : piece % 2 * 2 * piece_runs) + part * 512 + threadIdx.x % 32 * 16;
        multipliers = nibbles ? block + INT4_BLOCK_BYTES - BLOCK_ROWS + part * slice_rows : nullptr;
    }
};

INLINE void copy_piece(uint8* stage, const Weights& weights, const Walk& walk, const Slices& slices) {
    if (walk.slice < slices.count) {
        const Source source(weights, walk, slices);
        const int lane = threadIdx.x % 32;
        copy_async(stage + lane * 16, source.run);
        copy_async(stage + 512 + lane * 16, source.run + piece_runs);
        if (source.multipliers && lane == 0) copy_async(stage + 1024, source.multipliers);
    }
    copy_commit();  // an empty group too: groups are counted
}

// This lane's part of the sums of rows g and g + 8 of a slice.
struct Pair {
    int upper = 0, lower = 0;
};

// Of 128 channels. The zero point of a code, 8 or 7, is taken off with the sum of the operand, the multiplier comes last.
INLINE Pair multiply_nibbles(const uint8* stage, const uint32* operand) {
    const int lane = threadIdx.x % 32;
    const uint4* packed = reinterpret_cast<const uint4*>(stage) + lane;
    const uint4 first = packed[0], second = packed[32];
    const uint32 words[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
    int low = 0, high = 0, total = 0;
#pragma unroll
    for (int word = 0; word < 8; ++word) {
        const uint32 four = operand[word * 4 + lane % 4];
        low = dot_unsigned(words[word] & 0x0F0F0F0F, four, low);
        high = dot_unsigned(words[word] & 0xF0F0F0F0, four, high);  // 16 times as much
        total = dot_unsigned(0x01010101, four, total);
    }
    const uint32 upper = stage[1024 + lane / 4], lower = stage[1024 + 8 + lane / 4];
    const auto scaled = [&](uint32 stored, int sum) { return static_cast<int>(stored & 15) * (sum - static_cast<int>(8 - (stored >> 7)) * total); };
    return {scaled(upper, low), scaled(lower, high >> 4)};
}

// Of 64 channels.
INLINE Pair multiply_bytes(const uint8* stage, const uint32* operand) {
    const int lane = threadIdx.x % 32;
    Pair pair;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
        const uint4 words = reinterpret_cast<const uint4*>(stage)[step * 32 + lane];
        const uint32 first = operand[step * 8 + lane % 4], second = operand[step * 8 + 4 + lane % 4];
        pair.upper = dot_signed(words.z, second, dot_signed(words.x, first, pair.upper));
        pair.lower = dot_signed(words.w, second, dot_signed(words.y, first, pair.lower));
    }
    return pair;
}

INLINE void multiply_piece(int* sums, int* outlier_sums, const uint8* stage, const unsigned char* codes, const Weights& weights, const Walk& walk) {
    const bool outliers = walk.at_outliers(weights);
    const int piece = outliers ? walk.piece - weights.body_pieces() : walk.piece;
    Pair pair;
    if (WEIGHT_BITS == 4 && !outliers) {
        pair = multiply_nibbles(stage, reinterpret_cast<const uint32*>(codes + piece * BLOCK_K));
    } else {
        const int first = outliers ? weights.blocks * BLOCK_K : 0;
        pair = multiply_bytes(stage, reinterpret_cast<const uint32*>(codes + first + piece * (BLOCK_K / 2)));
    }
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
        pair.upper += __shfl_xor_sync(all_lanes, pair.upper, distance);
        pair.lower += __shfl_xor_sync(all_lanes, pair.lower, distance);
    }
    const int lane = threadIdx.x % 32, half = lane % 4;
    int* to = (outliers ? outlier_sums : sums) + walk.slice * slice_rows + half * 8 + lane / 4;
    if (half < 2) atomicAdd(to, half ? pair.lower : pair.upper);
}

// x, other, norm_weight, table and the numbers after `body`: those of quantize_activations, for its first token. total: x + other
// of ADD_NORM. weights ... bias: those of the GEMM. output (rows,), or (rows / 2,) where GATED: rows are
// whole slices then. A block's channels are as many as its threads at most.
extern "C" __global__ void __launch_bounds__(THREADS)
gemv(const Input* x, const Input* other, const Input* norm_weight, const Index* table, Input* total, const uint8* body_weights,
     const uint8* outlier_weights, const float* row_scale, const float* outlier_row_scale, const float* bias, Input* output, int rows,
     int channels, int body, float clip, float token_factor, float group_factor, float epsilon, int unit_offset) {
    extern __shared__ __align__(16) unsigned char shared_bytes[];
    __shared__ unsigned long long unused;  // a cluster's barrier
    const Shape shape(channels, body);
    const Lane lane(shape, 0);
    const Weights weights = {body_weights, outlier_weights, shape.body_blocks};
    const Slices slices(rows);
    const int own_rows = slices.count * slice_rows;

    uint8* ring = shared_bytes + threadIdx.x / 32 * STAGES * piece_bytes;
    unsigned char* codes = shared_bytes + warps * STAGES * piece_bytes;
    int* sums = reinterpret_cast<int*>(codes + shape.blocks * BLOCK_K);
    int* outlier_sums = sums + own_rows;
    Shared* shared = reinterpret_cast<Shared*>(outlier_sums + own_rows);
    float* token_scales = reinterpret_cast<float*>(shared + 1);  // the body's and the outliers'; 16 bytes, for what follows
    Input* staged = reinterpret_cast<Input*>(token_scales + 4);

    allow_next_kernel();
    const Ahead known(table, norm_weight, shape, lane);
    const int row = slices[threadIdx.x / slice_rows] * slice_rows + threadIdx.x % slice_rows;
    const bool finishes = threadIdx.x < own_rows && row < rows;
    const float scale = finishes ? row_scale[row] : 0.0f, outlier_scale = finishes && outlier_weights ? outlier_row_scale[row] : 0.0f;
    const float added = finishes && bias ? bias[row] : 0.0f;
    Walk ahead_of(weights), walk(weights);
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage, ahead_of.advance(weights)) copy_piece(ring + stage * piece_bytes, weights, ahead_of, slices);
    for (int i = threadIdx.x; i < 2 * own_rows; i += THREADS) sums[i] = 0;

    wait_for_previous_kernel();
    stage_row(staged, shared, {x, other, norm_weight, total, nullptr, channels, blockIdx.x == 0}, known.first_weight, epsilon, unit_offset);
    quantize_staged({codes, codes + shape.body_blocks * BLOCK_K, token_scales, token_scales + 1, nullptr, 1}, staged, shared, table, known, lane, shape,
                    {clip, token_factor, group_factor}, 0, {0, nullptr, unused});
    __syncthreads();

    int stage = 0;
#pragma unroll 1
    for (; walk.slice < slices.count; walk.advance(weights), ahead_of.advance(weights)) {
        copy_wait<STAGES - 1>();
        __syncwarp();  // one lane has copied the multipliers of all
        multiply_piece(sums, outlier_sums, ring + stage * piece_bytes, codes, weights, walk);
        __syncwarp();
        copy_piece(ring + stage * piece_bytes, weights, ahead_of, slices);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    __syncthreads();
    float result = 0.0f;
    if (finishes) {
        const float outliers = promote(outlier_sums[threadIdx.x], outlier_scale, token_scales[1], added);
        result = promote(sums[threadIdx.x], scale, token_scales[0], outlier_weights ? outliers : added);
    }
    if (GATED) {
        float* results = reinterpret_cast<float*>(sums);  // in place of the sums that the same thread has read
        if (threadIdx.x < own_rows) results[threadIdx.x] = rounded<Input>(result);
        __syncthreads();
        if (threadIdx.x < own_rows / 2)
            output[row] = from_float<Input>(rounded<Input>(silu(results[threadIdx.x])) * results[threadIdx.x + own_rows / 2]);
    } else if (finishes) {
        output[row] = from_float<Input>(result);
    }
}
