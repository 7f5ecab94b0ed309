// Y (tokens, rows) = X W^T for sm_90a: warpgroup MMAs take weights from registers, where they were unpacked, and
// activations from shared memory, where bulk copies put them. Operands are INT8 with int32 sums, or fp16 with fp32 sums.
//
// Weights are the A operand: a tile is ROW_GROUPS x 64 output channels by TOKENS tokens. Two warps are
// producers: they feed a ring of STAGES, each with STAGE_BLOCKS blocks of 128 channels of both operands. The consumer
// warpgroups share a stage: ROW_GROUPS of them by rows, times K_GROUPS by blocks. Integers are summed exactly, so however
// a tile's channels are split, the result is the same to the last bit; floats are summed in an order that the tile fixes.
//
// With EXPERTS the weights are those of so many experts under each other, and the tokens are sorted by the expert that
// each of them takes. How many there are of each is known on the device alone: tiles are counted there.
//
// The including file defines what a block of weights is, WEIGHT_BYTES and unpack(Fragment&, block, thread), in how many
// PLANES of 128 bytes a token's 128 channels lie, and what a Sum is; a Fragment has four steps for each plane.
#pragma once
#include "gemm_sm90a_consume.cuh"
#include "gemm_sm90a_produce.cuh"

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, BLOCKS_PER_SM)
gemm(const uint8* weights, const uint8* outlier_weights, const uint8* activations, const float* row_scale,
     const float* outlier_row_scale, const float* token_scale, const float* outlier_token_scale, const float* bias,
     uint16* output, Sum4* partials, int* flags, const int* expert_starts, int rows, int tokens, int padded_tokens, int blocks, int row_tiles,
     int token_tiles, int split_tiles) {
    extern __shared__ uint8 memory[];
    __shared__ uint64 full[STAGES], empty[STAGES];
    __shared__ int expert_table[2][EXPERTS + 1];
    // An offset, not a rounded pointer: a pointer that went through an integer is no longer known to be shared.
    uint8* shared = memory + (1024 - shared_address(memory) % 1024) % 1024;
    const Problem problem{weights, outlier_weights, activations, row_scale, outlier_row_scale, token_scale, outlier_token_scale,
                          bias, output, partials, flags, expert_starts, rows, tokens, padded_tokens, blocks, row_tiles, token_tiles, split_tiles};
    const ExpertTiles experts{expert_table[0], expert_table[1]};
    const Place place(problem, experts);
    const Ring ring{shared, full, empty};
    const int group = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0);  // the same in a warp, and known to be

    allow_next_kernel();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(full[stage], 2);
            barrier_init(empty[stage], CONSUMER_GROUPS * 4 * CLUSTER);
        }
        barrier_init_fence();
    }
    if (CLUSTER > 1) cluster_sync();
    else __syncthreads();
    if (EXPERTS) experts.count(problem);

    if (group == CONSUMER_GROUPS) {
        if (LARGE) give_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x == CONSUMER_GROUPS * WARPGROUP) produce_weights(problem, place, ring);
        if (threadIdx.x == CONSUMER_GROUPS * WARPGROUP + 32) produce_activations(problem, place, ring);
    } else {
        if (LARGE) take_registers<CONSUMER_REGISTERS>();
        Consumer(problem, place, ring, shared + STAGES * STAGE_BYTES, group).run();
    }
    if (CLUSTER > 1) cluster_sync();  // a block must not end while another one still copies to it
}
