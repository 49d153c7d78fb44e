// Types, and what C++ has no words for: PTX ISA 9.0.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short half_t;

__device__ __forceinline__ float widen(half_t h) {
  float f;
#if HALF
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
#else
  f = __uint_as_float((u32)h << 16);
#endif
  return f;
}

__device__ __forceinline__ half_t narrow(float f) {
  half_t h;
#if HALF
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
#endif
  return h;
}

// Two neighbours as one word.
__device__ __forceinline__ u32 narrow_two(float a, float b) { return (u32)narrow(a) | (u32)narrow(b) << 16; }
__device__ __forceinline__ float low_of(u32 two) { return widen((half_t)(two & 0xffff)); }
__device__ __forceinline__ float high_of(u32 two) { return widen((half_t)(two >> 16)); }

// The compiler has to know that it is the same for all threads of a warp.
__device__ __forceinline__ int uniform_warp() { return __shfl_sync(~0u, threadIdx.x / 32, 0); }

__device__ __forceinline__ long long nanoseconds() {
  long long now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ u64 streaming_policy() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void make_barrier(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// By who has made them, before others wait and before TMA arrives.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void arrive_expecting(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void await(u32 barrier, int parity) {
  asm volatile("{ .reg .pred done;\n"
               "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
               "@!done bra again; }" ::"r"(barrier), "r"(parity) : "memory");
}

// By all of a warp. Its lanes may see it in different looks: what wants them together, as matrix instructions do, comes after.
__device__ __forceinline__ void await_together(u32 barrier, int parity) {
  await(barrier, parity);
  __syncwarp();
}

// By all of a warp: what it has read in shared memory, or written there, may be overwritten by TMA. Without the fence
// a load may still wait behind stores to a busy memory when the barrier has it that all is read.
__device__ __forceinline__ void release(u32 barrier) {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncwarp();
  if (threadIdx.x % 32 == 0) arrive(barrier);
}

struct alignas(64) TensorMap { u64 words[16]; };

// Before its first use by a thread: a map that was copied to memory is read past the caches of ordinary loads.
__device__ __forceinline__ void know_map(const TensorMap* map) {
  asm volatile("fence.proxy.tensormap::generic.acquire.sys [%0], 128;" ::"l"(map) : "memory");
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Boxes of the maps are (64 inputs, rows, 4); of a gated weight, (64 inputs, 8 rows, gate and up, 1, 4): a tile has 8
// rows of each, so that one thread has both sums of an output. What is beyond the inputs arrives as zeros.
__device__ __forceinline__ void bring_x(u32 to, const TensorMap* x, int unit, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
               " [%0], [%1, {%3, %3, %4}], [%2];" ::"r"(to), "l"(x), "r"(barrier), "r"(0), "r"(4 * unit) : "memory");
}

__device__ __forceinline__ void bring_weight(u32 to, const TensorMap* w, int unit, int row, u32 barrier, u64 policy) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
               " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to), "l"(w), "r"(barrier), "r"(0), "r"(row),
               "r"(4 * unit), "l"(policy) : "memory");
}

// Into L2 only.
__device__ __forceinline__ void ask_weight(const TensorMap* w, int unit, int row) {
  asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(w), "r"(0), "r"(row),
               "r"(4 * unit) : "memory");
}

__device__ __forceinline__ void bring_gated(u32 to, const TensorMap* w, int unit, int tile, u32 barrier, u64 policy) {
  asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
               " [%0], [%1, {%3, %3, %3, %4, %5}], [%2], %6;" ::"r"(to), "l"(w), "r"(barrier), "r"(0), "r"(tile),
               "r"(4 * unit), "l"(policy) : "memory");
}

// What other blocks wrote is read from L2: a first-level cache may have older values.
__device__ __forceinline__ float load_float(const float* p) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ half_t load_half(const half_t* p) {
  half_t v;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(p) : "memory");
  return v;
}

// What others wait for, word by word: 16 bytes with a tag among them, which say by themselves that they are there. PTX
// has accesses of 128 bits as one scalar (`.b128`: one instruction, which nobody sees half of; a vector of smaller ones
// promises that for each element only): who sees the tag sees its data, with no fence, counter or order between words.
struct alignas(16) Word { u64 data, tag; };

__device__ __forceinline__ void publish(Word* to, u64 data, u64 tag) {
  asm volatile("{ .reg .b128 word;\n"
               "mov.b128 word, {%1, %2};\n"
               "st.relaxed.gpu.global.b128 [%0], word; }" ::"l"(to), "l"(data), "l"(tag) : "memory");
}

__device__ __forceinline__ void publish(Word* to, float x, float y, u64 tag) {
  publish(to, (u64)__float_as_uint(y) << 32 | __float_as_uint(x), tag);
}

__device__ __forceinline__ Word look(const Word* at) {
  Word seen;
  asm volatile("{ .reg .b128 word;\n"
               "ld.relaxed.gpu.global.b128 word, [%2];\n"
               "mov.b128 {%0, %1}, word; }" : "=l"(seen.data), "=l"(seen.tag) : "l"(at) : "memory");
  return seen;
}

__device__ __forceinline__ float first_of(const Word& w) { return __uint_as_float((u32)w.data); }
__device__ __forceinline__ float second_of(const Word& w) { return __uint_as_float((u32)(w.data >> 32)); }

struct alignas(16) Eight { u32 words[4]; };  // halves

__device__ __forceinline__ Eight load_eight(const half_t* p) {
  Eight v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3]) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ void store_eight(half_t* p, Eight v) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.words[0]), "r"(v.words[1]), "r"(v.words[2]),
               "r"(v.words[3]) : "memory");
}

__device__ __forceinline__ void widen_eight(const Eight& v, float (&f)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    f[2 * i] = widen((half_t)(v.words[i] & 0xffff));
    f[2 * i + 1] = widen((half_t)(v.words[i] >> 16));
  }
}

constexpr int REGS = 4;  // sums of a thread, of 16 rows of the weight and 8 of x

#if HALF
#define TYPES "f32.f16.f16.f32"
#else
#define TYPES "f32.bf16.bf16.f32"
#endif

__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// d += 16 rows x 16 inputs of the weight, times 8 rows of x.
__device__ __forceinline__ void multiply(float (&d)[REGS], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col." TYPES " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
