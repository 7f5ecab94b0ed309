// Instructions every architecture since sm_80 has: asynchronous copies into shared memory, matrix loads, warp MMAs.
// In a warp's m16n8 tile, lane l with g = l / 4, c = l % 4 holds d[0], d[1]: row g, columns 2 c, 2 c + 1; d[2], d[3]: row g + 8.
#pragma once
#include "load.cuh"

// 16 bytes; zeros where `inside` is false.
INLINE void copy_async(void* destination, const void* source, bool inside = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(destination)), "l"(source), "r"(inside ? 16 : 0) : "memory");
}

INLINE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int IN_FLIGHT> INLINE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(IN_FLIGHT) : "memory"); }

// Four 8x8 matrices of 16-byte rows: lane l gives the address of row l % 8 of matrix l / 8 and receives, of each matrix,
// the four bytes at 4 c of row g.
INLINE void load_matrices(uint32 (&matrix)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3]) : "r"(shared_address(row)));
}

// D (16 x 8, int32) = A (16 x 32, s8) * B (32 x 8, s8) + C. a[r]: row g + 8 (r % 2), k = 16 (r / 2) + 4 c; b[r]: column g, the same k.
INLINE void mma_s8(int (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, const int (&c)[4]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

// The same over 64 channels of s4: eight to a register, k = 32 (r / 2) + 8 c. Native on sm_80 to sm_89 alone; newer
// architectures call a routine of some 190 instructions.
INLINE void mma_s4(int (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, const int (&c)[4]) {
    asm volatile("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}
