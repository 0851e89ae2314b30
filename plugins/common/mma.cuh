// Tensor core and asynchronous copy instructions of sm_80 and later, one function per instruction.
//
// On a GPU these are PTX; elsewhere they are the same functions in plain C++ (mma_host.h), with the same
// distribution of a tile over the lanes of a warp. All lanes of a warp call the warp-wide ones together.
//
// Fragments of D(16 x 8) += A(16 x 16) B(16 x 8), with g = lane / 4 and t = lane % 4, two 16-bit values to a
// register, the first in its low half:
//   a[0] A[g    ][2t, 2t + 1]   a[1] A[g + 8][2t, 2t + 1]   a[2] A[g][2t + 8, 2t + 9]   a[3] A[g + 8][2t + 8, 2t + 9]
//   b[0] B[2t, 2t + 1][g]       b[1] B[2t + 8, 2t + 9][g]
//   d[0], d[1] D[g][2t, 2t + 1]                 d[2], d[3] D[g + 8][2t, 2t + 1]
// TF32 has half the depth, D(16 x 8) += A(16 x 8) B(8 x 8), one value to a register:
//   a[0] A[g][t]   a[1] A[g + 8][t]   a[2] A[g][t + 4]   a[3] A[g + 8][t + 4]   b[0] B[t][g]   b[1] B[t + 4][g]
#pragma once

#include <cstdint>

#ifdef __CUDACC__

namespace xlstm {

#define XLSTM_MMA_16(name, type)                                                                          \
    __device__ __forceinline__ void name(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                               \
                     ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"               \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                     \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                 \
    }
XLSTM_MMA_16(mma_f16, "f16")
XLSTM_MMA_16(mma_bf16, "bf16")
#undef XLSTM_MMA_16

// The values are FP32 words of which the tensor core reads the upper 19 bits: see round_tf32.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ uint32_t round_tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

// Four 8 x 8 matrices of 16-bit values from shared memory. Lane l names row l % 8 of matrix l / 8 (16 bytes,
// aligned); r[x] of lane l is row l / 4, columns 2 (l % 4) and the next, of matrix x.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void *row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// The same with every matrix transposed: r[x] of lane l is column l / 4, rows 2 (l % 4) and the next.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void *row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// 16 bytes to shared memory, of which the first `bytes` come from `global` and the rest are zero. Both
// addresses are aligned to 16; the bytes are there after copy_commit and copy_wait of the same thread, and for
// other threads after a barrier on top of that.
__device__ __forceinline__ void copy_async(void *shared, const void *global, int bytes) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes)
                 : "memory");
}

// Closes a group of the copies since the last commit.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's groups, the latest ones, are still under way.
template <int pending>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Two values rounded to nearest bfloat16, `low` in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

// Two values rounded to nearest half, `low` in the low half.
__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
    uint32_t bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

}  // namespace xlstm

#else
#include "common/mma_host.h"
#endif
