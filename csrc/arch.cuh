// Everything that is the hardware's own: the rest of the source is plain C++ over these functions. The tests compile it
// a second time with tests/emulator/arch.cuh in place of this file and run it on a CPU.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define ATTANCHOR_DEVICE __device__ __forceinline__
#define ATTANCHOR_RARE static __device__ __noinline__  // long and seldom run: kept out of the way of the rest
#define ATTANCHOR_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define ATTANCHOR_ARGUMENT(type) const __grid_constant__ type
#define ATTANCHOR_UNROLL _Pragma("unroll")

namespace attanchor::arch {

using word64 = unsigned long long;

struct alignas(16) Vector {
  uint32_t x, y, z, w;
};

// --- Element types -----------------------------------------------------------------------------------------------

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

ATTANCHOR_DEVICE float widen(float value) { return value; }
ATTANCHOR_DEVICE float widen(Half value) { return __half2float(__ushort_as_half(value.bits)); }
ATTANCHOR_DEVICE float widen(BFloat value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }

// Rounds to nearest, ties to even.
template <class E>
ATTANCHOR_DEVICE E narrow(float value);
template <>
ATTANCHOR_DEVICE float narrow<float>(float value) {
  return value;
}
template <>
ATTANCHOR_DEVICE Half narrow<Half>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}
template <>
ATTANCHOR_DEVICE BFloat narrow<BFloat>(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return {bits};
}

ATTANCHOR_DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
ATTANCHOR_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }
ATTANCHOR_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
ATTANCHOR_DEVICE float square_root(float value) { return sqrtf(value); }

// --- Where a thread is -------------------------------------------------------------------------------------------

ATTANCHOR_DEVICE int thread() { return threadIdx.x; }
ATTANCHOR_DEVICE int lane() { return threadIdx.x & 31; }
ATTANCHOR_DEVICE int warp() { return threadIdx.x >> 5; }
ATTANCHOR_DEVICE int block() { return blockIdx.x; }
ATTANCHOR_DEVICE int blocks() { return gridDim.x; }
ATTANCHOR_DEVICE uint8_t* shared_memory() {
  extern __shared__ __align__(128) uint8_t attanchor_shared[];
  return attanchor_shared;
}

// --- Inside a warp and a block -----------------------------------------------------------------------------------

ATTANCHOR_DEVICE void sync_block() { __syncthreads(); }
ATTANCHOR_DEVICE uint32_t ballot(bool vote) { return __ballot_sync(0xffffffffu, vote); }
template <class T>
ATTANCHOR_DEVICE T shuffle(T value, int source) {
  return __shfl_sync(0xffffffffu, value, source);
}
template <class T>
ATTANCHOR_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
ATTANCHOR_DEVICE int count_bits(uint32_t word) { return __popc(word); }
ATTANCHOR_DEVICE int highest_bit(uint32_t word) { return 31 - __clz(word); }
ATTANCHOR_DEVICE void add_shared(int* counter, int amount) { atomicAdd(counter, amount); }

// --- Between blocks ----------------------------------------------------------------------------------------------

ATTANCHOR_DEVICE void maximize(word64* word, word64 value) { atomicMax(word, value); }
ATTANCHOR_DEVICE unsigned add(unsigned* counter, unsigned amount) { return atomicAdd(counter, amount); }
// The same where nobody asks what was there: nothing is waited for.
ATTANCHOR_DEVICE void count(unsigned* counter, unsigned amount) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(amount) : "memory");
}
// Orders what this thread did, and what it knows of through a block barrier, before and after, for the whole device.
ATTANCHOR_DEVICE void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
ATTANCHOR_DEVICE unsigned load_now(const unsigned* word) {
  unsigned value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}
// What was done before the fence that comes before the value that is seen, is known from here on.
ATTANCHOR_DEVICE unsigned load_acquire(const unsigned* word) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}
// Past L1: another multiprocessor may have written the word since this one last looked.
ATTANCHOR_DEVICE word64 load_fresh(const word64* word) {
  word64 value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}
ATTANCHOR_DEVICE float load_fresh(const float* word) {
  float value;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(value) : "l"(word) : "memory");
  return value;
}
ATTANCHOR_DEVICE void pause() { __nanosleep(32); }
// Nanoseconds, the same on every multiprocessor.
ATTANCHOR_DEVICE word64 now() {
  word64 time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time)::"memory");
  return time;
}

// --- Clusters: blocks that reach into each other's shared memory --------------------------------------------------

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int LARGEST_CLUSTER = 1;
#else
constexpr int LARGEST_CLUSTER = 8;
#endif

// Ends the launch with an error, which says why in a build with ATTANCHOR_STAMPS.
ATTANCHOR_DEVICE void fail(const char* why) {
#ifdef ATTANCHOR_STAMPS
  __assert_fail(why, __FILE__, __LINE__, __func__);
#else
  __trap();
#endif
}

template <int CLUSTER>
ATTANCHOR_DEVICE int cluster_rank() {
  if constexpr (CLUSTER == 1) return 0;
  return blockIdx.x % CLUSTER;
}

// Until every block of the cluster is there. Of what was done before, what a thread knew of at its last fence is known
// behind it to all.
template <int CLUSTER>
ATTANCHOR_DEVICE void meet_cluster() {
  if constexpr (CLUSTER == 1) {
    __syncthreads();
  } else {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait.acquire;" ::: "memory");
#endif
  }
}

// The same, and all that was done before is known: by one fence a block, which waits for the whole GPU.
template <int CLUSTER>
ATTANCHOR_DEVICE void sync_cluster() {
  if constexpr (CLUSTER > 1) {
    __syncthreads();
#if __CUDA_ARCH__ >= 900
    if (thread() == 0) asm volatile("fence.acq_rel.cluster;" ::: "memory");
#endif
  }
  meet_cluster<CLUSTER>();
}

// The address, in the shared memory of a block of the cluster, of what lies at `own` in this block's.
template <int CLUSTER, class T>
ATTANCHOR_DEVICE T* peer(T* own, int rank) {
  if constexpr (CLUSTER == 1) return own;
#if __CUDA_ARCH__ >= 900
  uint64_t mapped;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(own), "r"(rank));
  return reinterpret_cast<T*>(mapped);
#else
  return own;
#endif
}

// --- Global to shared memory without registers --------------------------------------------------------------------

using Policy = uint64_t;

ATTANCHOR_DEVICE Policy keep_in_l2() {
  Policy policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0;" : "=l"(policy));
  return policy;
}
ATTANCHOR_DEVICE Policy drop_from_l2() {
  Policy policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  return policy;
}

ATTANCHOR_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// `bytes` (0 … SIZE) are read, the rest of the SIZE bytes becomes zero.
template <int SIZE>
ATTANCHOR_DEVICE void copy_async(void* to, const void* from, int bytes, Policy policy) {
  if constexpr (SIZE == 16) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes), "l"(policy)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], %2, %3, %4;" ::"r"(shared_address(to)),
                 "l"(from), "n"(SIZE), "r"(bytes), "l"(policy)
                 : "memory");
  }
}
ATTANCHOR_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most PENDING of this thread's groups are under way.
template <int PENDING>
ATTANCHOR_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// --- Bulk copies: the copy engine moves a stretch of memory by itself, sm_90 and later ------------------------------

// A barrier in shared memory that opens, again and again, when `arrivals` threads have said what they expect of it and
// all these bytes have come.
ATTANCHOR_DEVICE void start_bulk_barrier(word64* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Before the barrier of the block behind which the new barriers are used.
ATTANCHOR_DEVICE void show_bulk_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
ATTANCHOR_DEVICE void expect_bulk(word64* barrier, int bytes) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// Until the barrier has opened for the time whose number has this parity. What has come is then there for this thread.
template <class Patience>
ATTANCHOR_DEVICE void wait_bulk(word64* barrier, unsigned parity, const Patience& patience) {
  for (;;) {
    uint32_t open;
    asm volatile(
        "{\n.reg .pred open;\nmbarrier.try_wait.parity.shared::cta.b64 open, [%1], %2;\nselp.u32 %0, 1, 0, open;\n}"
        : "=r"(open)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    if (open != 0) break;
    patience.check();
  }
  __syncwarp();
}
// What this thread did to shared memory comes before bulk copies that start behind a barrier of the block.
ATTANCHOR_DEVICE void order_bulk() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Addresses and `bytes` are multiples of 16.
ATTANCHOR_DEVICE void load_bulk(void* to, const void* from, int bytes, word64* barrier, Policy policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}
ATTANCHOR_DEVICE void store_bulk(void* to, const void* from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
               "r"(bytes)
               : "memory");
}
// Until all that this thread has started to store has left shared memory, which may then be written again.
ATTANCHOR_DEVICE void wait_bulk_stores() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}

// --- Streaming access: rows that no multiprocessor uses again ---------------------------------------------------------

template <class V>
ATTANCHOR_DEVICE V load_stream(const V* from, Policy policy) {
  if constexpr (sizeof(V) == 16) {
    V v;
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from), "l"(policy)
                 : "memory");
    return v;
  } else {
    return __ldcs(from);
  }
}
// What is made is read next: it stays in L2 as anything does.
template <class V>
ATTANCHOR_DEVICE void store_stream(V* to, V v) {
  if constexpr (sizeof(V) == 16) {
    asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w)
                 : "memory");
  } else {
    __stcg(to, v);
  }
}

// --- Tensor cores ---------------------------------------------------------------------------------------------------

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
ATTANCHOR_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c (16 x 8, float32) += a (16 x 16) * b (16 x 8), fragments as PTX lays them out for mma.m16n8k16.
template <class E>
ATTANCHOR_DEVICE void multiply_matrices(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                        uint32_t b1);
template <>
ATTANCHOR_DEVICE void multiply_matrices<BFloat>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
ATTANCHOR_DEVICE void multiply_matrices<Half>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                              uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// --- Launch ---------------------------------------------------------------------------------------------------------

// `count` becomes how many blocks (of clusters of `cluster`) of a kernel the current device runs at once, 0 where it
// cannot run. Null, or what went wrong in asking.
template <class K>
const char* count_resident(K kernel, int threads, int shared, int cluster, int& count);

// Start `blocks` blocks. Null, or what went wrong.
template <class Argument>
const char* launch(void (*kernel)(Argument), int blocks, int threads, int shared, int cluster, void* stream,
                   const Argument& argument);

}  // namespace attanchor::arch

#include "launch.cuh"
