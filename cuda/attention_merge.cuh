// How what warps, parts of a sequence and blocks of a cluster found of the same queries becomes one result. The sums of a
// part count relative to a reference of its own; a merge takes the largest and scales them to it.
//
// Query, warps and shared_bytes are those of the kernel. INBOX, from the compiler's command line, is where the records that
// the others of a cluster send lie in shared memory.
#pragma once
#include "attention_tiles.cuh"
#include "cluster.cuh"

// What is known of one column: the sums of its channels relative to 2^reference, the reference and the weights' sum.
constexpr int record = head_dim + 4;

INLINE void leave(const State& state, float* records, int count) {
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int t = 0; t < query_tiles; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const auto [weight, minimum] = column_totals(state, t, i);
            const int column = t * 8 + 2 * c + i;
            if (column >= count) continue;
            float* at = records + column * record;
#pragma unroll
            for (int m = 0; m < channel_tiles; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    at[ValueSlice::channel(g, 2 * m + half)] = state.sums[t][m][2 * half + i] * (half ? code_unit * odd_place : code_unit) + minimum;
            if (g == 0) at[head_dim] = state.reference[t][i], at[head_dim + 1] = weight;
        }
}

// Records of other blocks come from L2: a first-level cache may hold a neighbour's part of what this block wrote.
template <bool GLOBAL, class T> INLINE T read(const T* at) {
    if constexpr (GLOBAL) return __ldcg(at);
    else return *at;
}

// Records lie [part][rows][record]. Finds what each part's record of each column counts, factors[part][column], and the
// columns' common references and weights. A warp takes a column, its lanes the parts.
template <bool GLOBAL> INLINE void weigh(float* factors, float2* totals, const float* records, int parts, int rows, int count) {
    const int lane = threadIdx.x % 32;
    for (int column = threadIdx.x / 32; column < count; column += warps) {
        const float* at = records + column * record + head_dim;
        float reference = nothing, weight = 0.0f;
        for (int part = lane; part < parts; part += 32) {
            factors[part * columns + column] = read<GLOBAL>(at + part * rows * record);
            reference = fmaxf(reference, factors[part * columns + column]);
        }
        for (int distance = 16; distance; distance /= 2) reference = fmaxf(reference, __shfl_xor_sync(all_lanes, reference, distance));
        for (int part = lane; part < parts; part += 32) {
            const float factor = exp2_approximate(factors[part * columns + column] - reference);
            factors[part * columns + column] = factor;
            weight += factor * read<GLOBAL>(at + part * rows * record + 1);
        }
        for (int distance = 16; distance; distance /= 2) weight += __shfl_xor_sync(all_lanes, weight, distance);
        if (lane == 0) totals[column] = make_float2(reference, weight);
    }
    __syncthreads();
}

// Four channels of a column, over all parts.
template <bool GLOBAL> INLINE float4 gather(const float* factors, const float* records, int parts, int rows, int column, int channel) {
    const float* at = records + column * record + channel;
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
    for (int part = 0; part < parts; ++part) {
        const float factor = factors[part * columns + column];
        const float4 values = read<GLOBAL>(reinterpret_cast<const float4*>(at + part * rows * record));
        sum.x += factor * values.x, sum.y += factor * values.y, sum.z += factor * values.z, sum.w += factor * values.w;
    }
    return sum;
}

struct alignas(8) FourQueries {
    Query channels[4];
};

// The result of all parts; column i of them goes to query first + i * step.
template <bool GLOBAL> INLINE void finish(Query* out, const float* value_bias, float* scratch, const float* records, int parts, int rows, int count,
                                          int first = 0, int step = 1) {
    float2* totals = reinterpret_cast<float2*>(scratch);
    float* factors = scratch + 2 * columns;
    weigh<GLOBAL>(factors, totals, records, parts, rows, count);
    for (int i = threadIdx.x * 4; i < count * head_dim; i += warps * 128) {
        const int column = i / head_dim, channel = i % head_dim;
        const float4 sum = gather<GLOBAL>(factors, records, parts, rows, column, channel);
        const float share = 1.0f / totals[column].y;
        float4 bias = {0.0f, 0.0f, 0.0f, 0.0f};
        if (value_bias) bias = *reinterpret_cast<const float4*>(value_bias + channel);
        const FourQueries four = {from_float<Query>(sum.x * share + bias.x), from_float<Query>(sum.y * share + bias.y),
                                  from_float<Query>(sum.z * share + bias.z), from_float<Query>(sum.w * share + bias.w)};
        *reinterpret_cast<FourQueries*>(out + (first + column * step) * head_dim + channel) = four;
    }
}

// Column c of a sequence is merged by part c % parts of the cluster, whose inbox has `rows` records of each part for it.
struct Inbox {
    int part, parts;

    INLINE int rows() const { return (columns + parts - 1) / parts; }
    INLINE int mine(int count) const { return (count - part + parts - 1) / parts; }  // columns that this part merges
    INLINE unsigned bytes(int count) const { return parts * max(mine(count), 0) * (head_dim + 2) * sizeof(float); }
    INLINE float* records() const { return reinterpret_cast<float*>(shared_bytes + INBOX); }

    // Two numbers of a column's record, at `place` of it.
    INLINE void give(int column, int place, float first, float second, const unsigned long long& landed) const {
        const float* at = records() + (part * rows() + column / parts) * record + place;
        send(reinterpret_cast<const uint2*>(at), __float_as_uint(first), __float_as_uint(second), landed, column % parts);
    }
};
