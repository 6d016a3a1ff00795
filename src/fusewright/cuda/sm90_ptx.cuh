// Hopper's own instructions (sm_90a), one named function each, and nothing else. The simulator has its own version of
// this file. Pointers to shared memory are generic pointers into the calling block's own shared memory, unless a name
// says "remote".
#pragma once
#include "major.cuh"
#include "vector.cuh"
#ifdef __CUDACC_RTC__
struct __nv_bfloat16;  // declared is enough, and takes NVRTC no time
#else
#include <cuda_bf16.h>
#endif

namespace fusewright {

// The driver's CUtensorMap, opaque: <cuda.h> does not compile under NVRTC.
struct alignas(64) TensorMap {
    unsigned char opaque[128];
};

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- Clusters -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Every thread of every block of the cluster waits for all the others, and sees their writes.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// ---- Registers ------------------------------------------------------------------------------------------------------

// Each warpgroup gives back, or takes, registers: kCount a thread from here on. A multiple of 8.
template <int kCount> __device__ __forceinline__ void registers_release() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount> __device__ __forceinline__ void registers_acquire() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- mbarrier -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the cluster and to the copy engine.
__device__ __forceinline__ void mbarrier_fence_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and makes the phase wait for `bytes` more bytes of bulk copies.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives at the barrier that lies at this address in block `rank` of the cluster (which may be this block).
// Without `.release.cluster`, which would cost a fence of all memory: reads need none.
__device__ __forceinline__ void mbarrier_arrive_remote(uint64_t* barrier, uint32_t rank) {
    asm volatile(
        "{\n\t.reg .b32 remote;\n\t"
        "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n\t}" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
}

// Whether the phase of this parity has completed; the hardware may let the thread sleep a while before it answers.
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n\t.reg .pred done;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n\t"
        "selp.b32 %0, 1, 0, done;\n\t}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return done;
}

// The same, answered at once.
__device__ __forceinline__ bool mbarrier_test_wait(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n\t.reg .pred done;\n\t"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n\t"
        "selp.b32 %0, 1, 0, done;\n\t}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return done;
}

// Stores 16 bytes to this address in block `rank` of the cluster, and counts them at the barrier that lies at this address
// there, as bulk copies are counted. Not by their proxy.
__device__ __forceinline__ void store_async(void* destination, uint64_t* barrier, uint32_t rank, float4 values) {
    asm volatile(
        "{\n\t.reg .b32 to, at;\n\t"
        "mapa.shared::cluster.u32 to, %0, %2;\n\t"
        "mapa.shared::cluster.u32 at, %1, %2;\n\t"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], {%3, %4, %5, %6}, [at];\n\t}" ::"r"(
            shared_address(destination)),
        "r"(shared_address(barrier)), "r"(rank), "f"(values.x), "f"(values.y), "f"(values.z), "f"(values.w)
        : "memory");
}

// ---- Bulk tensor copies (TMA) ---------------------------------------------------------------------------------------

// Makes this thread's writes to shared memory (and those that it knows of through barriers) visible to bulk copies and
// to the tensor cores, which might otherwise miss them.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void tensor_map_prefetch(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies the map's box at coordinates (x innermost, y, z) to `destination`; its bytes count at `barrier`.
// What lies outside the tensor arrives as zeros and counts too.
__device__ __forceinline__ void tensor_load(void* destination, const TensorMap* map, uint64_t* barrier, int x, int y,
                                            int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(shared_address(destination)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
        : "memory");
}

// The same, to this address, and counted at this barrier, in every block of the cluster whose bit is set in `blocks`.
__device__ __forceinline__ void tensor_load_multicast(void* destination, const TensorMap* map, uint64_t* barrier, int x,
                                                      int y, int z, uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%4, %5, %6}], [%2], %3;" ::"r"(shared_address(destination)),
        "l"(map), "r"(shared_address(barrier)), "h"(blocks), "r"(x), "r"(y), "r"(z)
        : "memory");
}

// Copies `source` to the map's box at coordinates (x, y, z); what lies outside the tensor is left out.
__device__ __forceinline__ void tensor_store(const TensorMap* map, const void* source, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                 "r"(shared_address(source)), "r"(x), "r"(y), "r"(z)
                 : "memory");
}

// Closes the group of this thread's stores since the last one.
__device__ __forceinline__ void tensor_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most the kPending latest groups of this thread's stores still read shared memory.
template <int kPending> __device__ __forceinline__ void tensor_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Waits until at most the kPending latest groups of this thread's stores are unfinished.
template <int kPending> __device__ __forceinline__ void tensor_store_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Matrices between registers and shared memory -------------------------------------------------------------------

// Stores four 8 × 8 matrices of 16-bit elements. Lane i gives the address of row i % 8 (16 bytes) of matrix i / 8, and
// holds in values[j], of matrix j, row i / 4, columns i % 4 * 2 and the next.
__device__ __forceinline__ void matrix_store(void* row, const uint32_t (&values)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(values[0]), "r"(values[1]), "r"(values[2]), "r"(values[3])
                 : "memory");
}

// The same transposed: values[j] holds column i / 4, rows i % 4 * 2 and the next.
__device__ __forceinline__ void matrix_store_transposed(void* row, const uint32_t (&values)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(values[0]), "r"(values[1]), "r"(values[2]), "r"(values[3])
                 : "memory");
}

// ---- Warpgroup matrix products (wgmma) ------------------------------------------------------------------------------

// Orders the warpgroup's accesses to accumulator registers before the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of the products issued since the last one.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the kPending latest groups are unfinished.
template <int kPending> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler does not know that products write registers after they are issued: accesses to them stay on their side
// of this. Those to memory need not, and to hold them too would slow the compiler down.
template <int kCount> __device__ __forceinline__ void hold_registers(float (&values)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i]));
}

#define FUSEWRIGHT_8(d, i)                                                                                       \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define FUSEWRIGHT_16(d, i) FUSEWRIGHT_8(d, i), FUSEWRIGHT_8(d, i + 8)
// So many sums as operands of an instruction, and their names there.
#define FUSEWRIGHT_SUMS_32(d) FUSEWRIGHT_16(d, 0), FUSEWRIGHT_16(d, 16)
#define FUSEWRIGHT_SUMS_48(d) FUSEWRIGHT_SUMS_32(d), FUSEWRIGHT_16(d, 32)
#define FUSEWRIGHT_SUMS_64(d) FUSEWRIGHT_SUMS_48(d), FUSEWRIGHT_16(d, 48)
#define FUSEWRIGHT_SUMS_80(d) FUSEWRIGHT_SUMS_64(d), FUSEWRIGHT_16(d, 64)
#define FUSEWRIGHT_SUMS_96(d) FUSEWRIGHT_SUMS_80(d), FUSEWRIGHT_16(d, 80)
#define FUSEWRIGHT_SUMS_112(d) FUSEWRIGHT_SUMS_96(d), FUSEWRIGHT_16(d, 96)
#define FUSEWRIGHT_SUMS_128(d) FUSEWRIGHT_SUMS_112(d), FUSEWRIGHT_16(d, 112)
#define FUSEWRIGHT_NAMES_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FUSEWRIGHT_NAMES_48 \
    FUSEWRIGHT_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FUSEWRIGHT_NAMES_64 \
    FUSEWRIGHT_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FUSEWRIGHT_NAMES_80 \
    FUSEWRIGHT_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define FUSEWRIGHT_NAMES_96 \
    FUSEWRIGHT_NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FUSEWRIGHT_NAMES_112 \
    FUSEWRIGHT_NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, " \
    "%108, %109, %110, %111"
#define FUSEWRIGHT_NAMES_128 \
    FUSEWRIGHT_NAMES_112 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
    "%124, %125, %126, %127"

template <class Element> constexpr const bool kIsBfloat16 = false;
template <> constexpr const bool kIsBfloat16<__nv_bfloat16> = true;
template <class Element> constexpr const bool kIsFloat = false;
template <> constexpr const bool kIsFloat<float> = true;

// d (64 × kColumns, a warpgroup's) = (accumulate ? d : 0) + A (64 × k) · B (k × kColumns), asynchronously; k is 16, or 8 of
// floats, which count as TF32: their lower 13 bits do not, and both matrices are K-major.
// Thread t holds, as d[i], row t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, column i / 4 * 8 + t % 4 * 2 + i % 2.
#define FUSEWRIGHT_PRODUCT(TYPE, COLUMNS, SUMS, A, B, ACCUMULATE, MAJOR_A, MAJOR_B)                                  \
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #ACCUMULATE ", 0;\n\t"                                     \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE " {" FUSEWRIGHT_NAMES_##SUMS  \
                 "}, %" #A ", %" #B ", p, 1, 1, %" #MAJOR_A ", %" #MAJOR_B ";\n\t}"                                  \
                 : FUSEWRIGHT_SUMS_##SUMS(d)                                                                         \
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(kMajorA == Major::MN), "n"(kMajorB == Major::MN))
#define FUSEWRIGHT_TF32_PRODUCT(COLUMNS, SUMS, A, B, ACCUMULATE, ...)                                                \
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #ACCUMULATE ", 0;\n\t"                                     \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k8.f32.tf32.tf32 {" FUSEWRIGHT_NAMES_##SUMS           \
                 "}, %" #A ", %" #B ", p, 1, 1;\n\t}"                                                                \
                 : FUSEWRIGHT_SUMS_##SUMS(d)                                                                         \
                 : "l"(a), "l"(b), "r"(int(accumulate)))
#define FUSEWRIGHT_WGMMA(COLUMNS, SUMS, ...)                                                                \
    template <class Element, Major kMajorA, Major kMajorB>                                                  \
    __device__ __forceinline__ void wgmma(float (&d)[SUMS], uint64_t a, uint64_t b, bool accumulate) {      \
        static_assert(!kIsFloat<Element> || (kMajorA == Major::K && kMajorB == Major::K));                  \
        if constexpr (kIsFloat<Element>) FUSEWRIGHT_TF32_PRODUCT(COLUMNS, SUMS, __VA_ARGS__);            \
        else if constexpr (kIsBfloat16<Element>) FUSEWRIGHT_PRODUCT("bf16", COLUMNS, SUMS, __VA_ARGS__);    \
        else FUSEWRIGHT_PRODUCT("f16", COLUMNS, SUMS, __VA_ARGS__);                                         \
    }
FUSEWRIGHT_WGMMA(64, 32, 32, 33, 34, 35, 36)
FUSEWRIGHT_WGMMA(96, 48, 48, 49, 50, 51, 52)
FUSEWRIGHT_WGMMA(128, 64, 64, 65, 66, 67, 68)
FUSEWRIGHT_WGMMA(160, 80, 80, 81, 82, 83, 84)
FUSEWRIGHT_WGMMA(192, 96, 96, 97, 98, 99, 100)
FUSEWRIGHT_WGMMA(224, 112, 112, 113, 114, 115, 116)
FUSEWRIGHT_WGMMA(256, 128, 128, 129, 130, 131, 132)
#undef FUSEWRIGHT_PRODUCT
#undef FUSEWRIGHT_TF32_PRODUCT
#undef FUSEWRIGHT_WGMMA

// The same with A (fp16) in registers. Register a[i] of thread t holds row t / 32 * 16 + t % 32 / 4 + i % 2 * 8,
// k i / 2 * 8 + t % 4 * 2 and the next. It may be written again when the product's group has been waited for.
template <Major kMajorB>
__device__ __forceinline__ void wgmma_registers(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %69, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" FUSEWRIGHT_NAMES_64
                 "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n\t}"
                 : FUSEWRIGHT_SUMS_64(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(kMajorB == Major::MN));
}

template <Major kMajorB>
__device__ __forceinline__ void wgmma_registers(float (&d)[128], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %133, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {" FUSEWRIGHT_NAMES_128
                 "}, {%128, %129, %130, %131}, %132, p, 1, 1, %134;\n\t}"
                 : FUSEWRIGHT_SUMS_128(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(kMajorB == Major::MN));
}

#undef FUSEWRIGHT_8
#undef FUSEWRIGHT_16
#undef FUSEWRIGHT_SUMS_32
#undef FUSEWRIGHT_NAMES_32
#undef FUSEWRIGHT_SUMS_48
#undef FUSEWRIGHT_NAMES_48
#undef FUSEWRIGHT_SUMS_64
#undef FUSEWRIGHT_NAMES_64
#undef FUSEWRIGHT_SUMS_80
#undef FUSEWRIGHT_NAMES_80
#undef FUSEWRIGHT_SUMS_96
#undef FUSEWRIGHT_NAMES_96
#undef FUSEWRIGHT_SUMS_112
#undef FUSEWRIGHT_NAMES_112
#undef FUSEWRIGHT_SUMS_128
#undef FUSEWRIGHT_NAMES_128

}  // namespace fusewright
