// Products of a warpgroup with its own factor, the codes, in registers: compute capability 9.0a.
#pragma once

#include "../../attention/cuda/hopper.cuh"

namespace quire {

#define QUIRE_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define QUIRE_D8(i) QUIRE_D4(i), QUIRE_D4(i + 4)
#define QUIRE_D16(i) QUIRE_D8(i), QUIRE_D8(i + 8)
#define QUIRE_D32(i) QUIRE_D16(i), QUIRE_D16(i + 16)
#define QUIRE_D64(i) QUIRE_D32(i), QUIRE_D32(i + 32)

// d += a * b^T: 64 rows of a in registers, N rows of b in shared memory, 16 deep.
template <typename T, int N>
struct RegisterProduct;

#define QUIRE_REGISTER_PRODUCT(T, NAME, N, PLACES, A0, A1, A2, A3, B, ...)                   \
    template <>                                                                                \
    struct RegisterProduct<T, N> {                                                             \
        static __device__ __forceinline__ void add(float (&d)[N / 2], const uint32_t* a,       \
                                                   uint64_t b) {                               \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME        \
                         " {" PLACES "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", 1, 1, 1, 0;\n" \
                         : __VA_ARGS__                                                              \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                \
        }                                                                                      \
    }
#define QUIRE_REGISTER_PRODUCTS(...)                              \
    QUIRE_REGISTER_PRODUCT(__nv_bfloat16, "bf16", __VA_ARGS__); \
    QUIRE_REGISTER_PRODUCT(__half, "f16", __VA_ARGS__)

#define QUIRE_PLACES_16 \
    "%0, %1, %2, %3, %4, %5, %6, %7"
QUIRE_REGISTER_PRODUCTS(16, QUIRE_PLACES_16, "%8", "%9", "%10", "%11", "%12",
                        QUIRE_D8(0));

#define QUIRE_PLACES_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
QUIRE_REGISTER_PRODUCTS(32, QUIRE_PLACES_32, "%16", "%17", "%18", "%19", "%20",
                        QUIRE_D16(0));

#define QUIRE_PLACES_64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
QUIRE_REGISTER_PRODUCTS(64, QUIRE_PLACES_64, "%32", "%33", "%34", "%35", "%36",
                        QUIRE_D32(0));

#define QUIRE_PLACES_96 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
QUIRE_REGISTER_PRODUCTS(96, QUIRE_PLACES_96, "%48", "%49", "%50", "%51", "%52",
                        QUIRE_D32(0), QUIRE_D16(32));

#define QUIRE_PLACES_128 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
QUIRE_REGISTER_PRODUCTS(128, QUIRE_PLACES_128, "%64", "%65", "%66", "%67", "%68",
                        QUIRE_D64(0));

#define QUIRE_PLACES_192 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
QUIRE_REGISTER_PRODUCTS(192, QUIRE_PLACES_192, "%96", "%97", "%98", "%99", "%100",
                        QUIRE_D64(0), QUIRE_D32(64));

#define QUIRE_PLACES_256 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
QUIRE_REGISTER_PRODUCTS(256, QUIRE_PLACES_256, "%128", "%129", "%130", "%131", "%132",
                        QUIRE_D64(0), QUIRE_D64(64));

}  // namespace quire
