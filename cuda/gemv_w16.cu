// A linear layer in 16 bits for a single token, from the row before it to its output: (residual add +) RMSNorm or SiLU(gate) * up,
// and the product, in one kernel. It lasts as long as its weights take to be read, if they are read all the time; so every
// block stages the whole row for itself, while its first weights are on their way, and an SM has room for a block of the next
// kernel, which asks for its first weights when this one has asked for its last.
//
// A block owns neighbouring output channels, rows of the weights; its warps share their pieces: LOADS times 512 bytes of a row.
// Each warp has a ring of its own, filled by asynchronous copies; a lane multiplies the bytes it copied itself. A piece leaves
// one sum in shared memory, and a thread adds up those of a row, so that the order, and the result, are always the same.
//
// GATED: the rows are those of a gate and of as many ups under it; a block owns the same of both, and what it puts out is
// silu(gate) * up, rounded wherever torch would hold a tensor.
//
// THREADS, LOADS (16 bytes of a lane in a piece), STAGES (pieces in a warp's ring) and LATE (the next kernel starts when the last
// piece is asked for, instead of at once) come beside the parameters of prologue.cuh.

#include "stage_row.cuh"

#include "mma_sync.cuh"
#include "pairs.cuh"

constexpr int warps = THREADS / 32;
constexpr int width = 16 / sizeof(Input);  // channels that a lane loads at once
constexpr int load_channels = 32 * width, load_bytes = 512;
constexpr int piece_channels = LOADS * load_channels, piece_bytes = LOADS * load_bytes;

struct Weights {
    const Input* values;  // [row][channel]
    int channels;

    INLINE int pieces() const { return (channels + piece_channels - 1) / piece_channels; }  // of a row
};

// The rows of a block, numbered 0 ... count - 1; of a gate and its ups, the gate's come first.
struct Rows {
    int first, count, apart;  // `apart`: from a row of the gate to that of its up

    INLINE explicit Rows(int rows) {
        const int all = rows / (GATED + 1);
        first = static_cast<int>(static_cast<long long>(all) * blockIdx.x / gridDim.x);
        count = (static_cast<int>(static_cast<long long>(all) * (blockIdx.x + 1) / gridDim.x) - first) * (GATED + 1);
        apart = all;
    }

    INLINE int outputs() const { return count / (GATED + 1); }
    INLINE int operator[](int number) const { return GATED && number >= outputs() ? first + apart + number - outputs() : first + number; }
};

// One warp's walk over the pieces of its block's rows: every warps-th of them.
struct Walk {
    int row, piece;

    INLINE explicit Walk(const Weights& weights) : row(0), piece(threadIdx.x / 32) { wrap(weights); }

    INLINE void advance(const Weights& weights) {
        piece += warps;
        wrap(weights);
    }

    INLINE void wrap(const Weights& weights) {
        for (; piece >= weights.pieces(); piece -= weights.pieces()) ++row;
    }

    // Where this lane's part of a load of the piece begins; the last piece of a row may end before.
    INLINE int channel(int load) const { return piece * piece_channels + load * load_channels + threadIdx.x % 32 * width; }
};

// ---------------------------------------------------------------------------------------------------- load

INLINE uint8* lane_of(uint8* stage, int load) { return stage + load * load_bytes + threadIdx.x % 32 * 16; }

INLINE void copy_piece(uint8* stage, const Weights& weights, const Walk& walk, const Rows& rows) {
    if (walk.row < rows.count) {
        const Input* row = weights.values + static_cast<long long>(rows[walk.row]) * weights.channels;
#pragma unroll
        for (int load = 0; load < LOADS; ++load)
            if (walk.channel(load) < weights.channels) copy_async(lane_of(stage, load), row + walk.channel(load));
    }
    copy_commit();  // an empty group too: groups are counted
}

// A row that nothing is done to, all of it at once: stage_row waits for 8 channels of a thread before it asks for the next.
INLINE void copy_row(Input* staged, const Input* x, int channels) {
    for (int channel = threadIdx.x * width; channel < channels; channel += THREADS * width) copy_async(staged + channel, x + channel);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
}

// ------------------------------------------------------------------------------------------------ multiply

// sum + a . b of two 16-bit numbers each, in fp32.
INLINE float dot_pair(uint32 a, uint32 b, float sum) {
    using Both = Pair<Input>;
    return __fmaf_rn(Both::second(a), Both::second(b), __fmaf_rn(Both::first(a), Both::first(b), sum));
}

INLINE float dot_words(const uint4& a, const uint4& b, float sum) {
    return dot_pair(a.w, b.w, dot_pair(a.z, b.z, dot_pair(a.y, b.y, dot_pair(a.x, b.x, sum))));
}

// This lane's part.
INLINE float multiply_piece(uint8* stage, const Input* staged, const Weights& weights, const Walk& walk) {
    float sum = 0.0f;
#pragma unroll
    for (int load = 0; load < LOADS; ++load) {
        const int channel = walk.channel(load);
        if (channel >= weights.channels) break;
        sum += dot_words(*reinterpret_cast<const uint4*>(lane_of(stage, load)), *reinterpret_cast<const uint4*>(staged + channel), 0.0f);
    }
    return sum;
}

INLINE float sum_over_warp(float sum) {
#pragma unroll
    for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(all_lanes, sum, distance);
    return sum;
}

// --------------------------------------------------------------------------------------------------- store

// The output of one of the block's rows, before it is rounded.
INLINE float finished(const float* piece_sums, const Input* bias, const Weights& weights, const Rows& rows, int number) {
    float sum = 0.0f;
    for (int piece = 0; piece < weights.pieces(); ++piece) sum += piece_sums[number * weights.pieces() + piece];
    return bias ? sum + to_float(bias[rows[number]]) : sum;
}

// x, other, norm_weight, total, epsilon: those of gemv. values (rows, channels), bias (rows,) or null. output (rows,), or
// (rows / 2,) where GATED. Channels are a multiple of 8 and the weights aligned to 16 bytes.
extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS)  // 64 registers: an SM holds two kernels of 512 threads
gemv_w16(const Input* x, const Input* other, const Input* norm_weight, Input* total, const Input* values, const Input* bias, Input* output, int rows_of_all,
         int channels, float epsilon) {
    extern __shared__ __align__(16) unsigned char shared_bytes[];
    const Weights weights = {values, channels};
    const Rows rows(rows_of_all);

    uint8* ring = shared_bytes + threadIdx.x / 32 * STAGES * piece_bytes;
    PartialSums& partial_sums = *reinterpret_cast<PartialSums*>(shared_bytes + warps * STAGES * piece_bytes);
    Input* staged = reinterpret_cast<Input*>(&partial_sums + 1);
    float* piece_sums = reinterpret_cast<float*>(staged + channels + width);  // behind the row, a zero and what aligns

    if (!LATE) allow_next_kernel();
    Walk ahead_of(weights), walk(weights);
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage, ahead_of.advance(weights)) copy_piece(ring + stage * piece_bytes, weights, ahead_of, rows);
    StageChunk first_weight;
    const int first = threadIdx.x * stage_width;
    if (overlaps && has_norm && first < channels) first_weight = *reinterpret_cast<const StageChunk*>(norm_weight + first);

    wait_for_previous_kernel();
    if (prologue == PLAIN && aligned) copy_row(staged, x, channels);
    else stage_row<overlaps>(staged, partial_sums, {x, other, norm_weight, total, nullptr, channels, blockIdx.x == 0}, first_weight, epsilon, 0);

    int stage = 0;
#pragma unroll 1
    for (; walk.row < rows.count; walk.advance(weights), ahead_of.advance(weights)) {
        copy_wait<STAGES - 1>();
        const float lane_sum = multiply_piece(ring + stage * piece_bytes, staged, weights, walk);
        copy_piece(ring + stage * piece_bytes, weights, ahead_of, rows);
        if (LATE && ahead_of.row >= rows.count) allow_next_kernel();
        const float sum = sum_over_warp(lane_sum);
        if (threadIdx.x % 32 == 0) piece_sums[walk.row * weights.pieces() + walk.piece] = sum;
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    __syncthreads();
    for (int number = threadIdx.x; number < rows.outputs(); number += THREADS) {
        float result = finished(piece_sums, bias, weights, rows, number);
        if (GATED) {
            const float up = rounded<Input>(finished(piece_sums, bias, weights, rows, number + rows.outputs()));
            result = rounded<Input>(silu(rounded<Input>(result))) * up;
        }
        output[rows[number]] = from_float<Input>(result);
    }
}
