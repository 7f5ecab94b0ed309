// The Hadamard transform of one head that a warp holds: lane l has channels l, l + 32, ...
#pragma once

// That of formats/groups.py, bit for bit: blocks of powers of two, largest first, butterflies from distance 1 upwards, the
// factor last. 96 channels are a block of 64 and one of 32.
template <int HEAD> __device__ __forceinline__ void hadamard(float (&values)[HEAD / 32]) {
    constexpr int count = HEAD / 32, whole = HEAD == 96 ? 2 : count;
    constexpr float factor_32 = 0.17677669529663687f;
    constexpr float factor = whole == 2 ? 0.125f : whole == 4 ? 0.08838834764831845f : 0.0625f;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2)
#pragma unroll
        for (int k = 0; k < count; ++k) {
            const float other = __shfl_xor_sync(0xFFFFFFFFu, values[k], distance);
            values[k] = lane & distance ? __fsub_rn(other, values[k]) : __fadd_rn(values[k], other);
        }
#pragma unroll
    for (int step = 1; step < whole; step *= 2)
#pragma unroll
        for (int k = 0; k < whole; ++k)
            if (!(k & step)) {
                const float low = values[k], high = values[k + step];
                values[k] = __fadd_rn(low, high), values[k + step] = __fsub_rn(low, high);
            }
#pragma unroll
    for (int k = 0; k < count; ++k) values[k] = __fmul_rn(values[k], k < whole ? factor : factor_32);
}
