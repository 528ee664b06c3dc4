// What compute capability 9.0a adds: barriers in shared memory that count bytes, copies of tensor
// tiles, and products of a warpgroup (4 warps) whose factors lie in shared memory.
//
// Tiles lie in shared memory as chunks of 64 columns, a row of 128 bytes after the other, with the
// 16-byte pieces of a row swizzled by (row & 7): tiles start at multiples of 1,024 bytes.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace quire {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(arrivals));
}

__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}

// Wait until the phase with this parity is over.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// A barrier of one warpgroup; 0 is that of the whole block.
__device__ __forceinline__ void warpgroup_sync(int id) {
    asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory");
}

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Shared memory written by plain stores is seen by copies and products after this and a barrier.
__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void copy_tile(void* to, const CUtensorMap* map, uint64_t* barrier,
                                          int column, int row, int plane) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(plane)
        : "memory");
}

__device__ __forceinline__ void products_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void products_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keep the compiler from moving reads and writes of sums over this place.
template <int N>
__device__ __forceinline__ void pin(float (&values)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

// Keep the compiler from moving a wait above what a sum of exponentials needs, which belongs beside
// the products that are waited for: it cannot know that the sum is never negative.
__device__ __forceinline__ void compute_before_here(float sum) {
    asm volatile(
        "{\n.reg .pred never;\nsetp.lt.f32 never, %0, 0f00000000;\n"
        "@never st.shared.f32 [%1], %0;\n}\n" ::"f"(sum), "r"(0)
        : "memory");
}

// A matrix in shared memory, for a product: `leading` and `stride` are bytes between chunks of 64
// columns (read along rows only) and between groups of 8 rows.
__device__ __forceinline__ uint64_t matrix_at(const void* pointer, int leading, int stride) {
    const uint64_t address = (shared_address(pointer) & 0x3FFFF) >> 4;
    const uint64_t swizzled_by_128_bytes = 1;
    return address | static_cast<uint64_t>(leading >> 4) << 16 |
           static_cast<uint64_t>(stride >> 4) << 32 | swizzled_by_128_bytes << 62;
}

#define QUIRE_REGISTERS_32 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15," \
    " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define QUIRE_REGISTERS_64 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15," \
    " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31," \
    " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47," \
    " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define QUIRE_SUMS_8(i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define QUIRE_SUMS_32 QUIRE_SUMS_8(0), QUIRE_SUMS_8(8), QUIRE_SUMS_8(16), QUIRE_SUMS_8(24)
#define QUIRE_SUMS_64 \
    QUIRE_SUMS_32, QUIRE_SUMS_8(32), QUIRE_SUMS_8(40), QUIRE_SUMS_8(48), QUIRE_SUMS_8(56)

// Products of 64 rows: d = a * b^T + (keep ? d : 0), b read along its rows ("shared"), and
// d = a * b + (keep ? d : 0), a in registers and b read along its columns ("registers"); 16 deep.
template <typename T, int N>
struct Product;

template <>
struct Product<__nv_bfloat16, 64> {
    static __device__ __forceinline__ void shared(float (&d)[32], uint64_t a, uint64_t b,
                                                  int keep) {
        asm volatile(
            "{\n.reg .pred keep;\nsetp.ne.b32 keep, %34, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " QUIRE_REGISTERS_32
            ", %32, %33, keep, 1, 1, 0, 0;\n}\n"
            : QUIRE_SUMS_32
            : "l"(a), "l"(b), "r"(keep));
    }
    static __device__ __forceinline__ void registers(float (&d)[32], const uint32_t* a, uint64_t b,
                                                     int keep) {
        asm volatile(
            "{\n.reg .pred keep;\nsetp.ne.b32 keep, %37, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " QUIRE_REGISTERS_32
            ", {%32, %33, %34, %35}, %36, keep, 1, 1, 1;\n}\n"
            : QUIRE_SUMS_32
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
    }
};

template <>
struct Product<__nv_bfloat16, 128> {
    static __device__ __forceinline__ void shared(float (&d)[64], uint64_t a, uint64_t b,
                                                  int keep) {
        asm volatile(
            "{\n.reg .pred keep;\nsetp.ne.b32 keep, %66, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " QUIRE_REGISTERS_64
            ", %64, %65, keep, 1, 1, 0, 0;\n}\n"
            : QUIRE_SUMS_64
            : "l"(a), "l"(b), "r"(keep));
    }
    static __device__ __forceinline__ void registers(float (&d)[64], const uint32_t* a, uint64_t b,
                                                     int keep) {
        asm volatile(
            "{\n.reg .pred keep;\nsetp.ne.b32 keep, %69, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " QUIRE_REGISTERS_64
            ", {%64, %65, %66, %67}, %68, keep, 1, 1, 1;\n}\n"
            : QUIRE_SUMS_64
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
    }
};

template <>
struct Product<__half, 64> {
    static __device__ __forceinline__ void shared(float (&d)[32], uint64_t a, uint64_t b,
                                                  int keep) {
        asm volatile(
            "{\n.reg .pred keep;\nsetp.ne.b32 keep, %34, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " QUIRE_REGISTERS_32
            ", %32, %33, keep, 1, 1, 0, 0;\n}\n"
            : QUIRE_SUMS_32
            : "l"(a), "l"(b), "r"(keep));
    }
    static __device__ __forceinline__ void registers(float (&d)[32], const uint32_t* a, uint64_t b,
                                                     int keep) {
        asm volatile(
            "{\n.reg .pred keep;\nsetp.ne.b32 keep, %37, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " QUIRE_REGISTERS_32
            ", {%32, %33, %34, %35}, %36, keep, 1, 1, 1;\n}\n"
            : QUIRE_SUMS_32
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
    }
};

template <>
struct Product<__half, 128> {
    static __device__ __forceinline__ void shared(float (&d)[64], uint64_t a, uint64_t b,
                                                  int keep) {
        asm volatile(
            "{\n.reg .pred keep;\nsetp.ne.b32 keep, %66, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " QUIRE_REGISTERS_64
            ", %64, %65, keep, 1, 1, 0, 0;\n}\n"
            : QUIRE_SUMS_64
            : "l"(a), "l"(b), "r"(keep));
    }
    static __device__ __forceinline__ void registers(float (&d)[64], const uint32_t* a, uint64_t b,
                                                     int keep) {
        asm volatile(
            "{\n.reg .pred keep;\nsetp.ne.b32 keep, %69, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " QUIRE_REGISTERS_64
            ", {%64, %65, %66, %67}, %68, keep, 1, 1, 1;\n}\n"
            : QUIRE_SUMS_64
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
    }
};

#undef QUIRE_SUMS_64
#undef QUIRE_SUMS_32
#undef QUIRE_SUMS_8
#undef QUIRE_REGISTERS_64
#undef QUIRE_REGISTERS_32

}  // namespace quire
