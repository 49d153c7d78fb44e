// Products of warp groups and dependent launches, in words of PTX ISA 9.0. `multiply<N>` itself is written by
// `product_chain.py`, for every N that a model's tiles have.
#pragma once

#include "ptx.cuh"

// -- launches: a kernel may be resident before the one before it has ended --------------------------------------

__device__ __forceinline__ void let_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Until all that was launched before has ended, and what it wrote is there.
__device__ __forceinline__ void await_launches() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// -- counters in memory, which other blocks add to ----------------------------------------------------------------

__device__ __forceinline__ void count(u32* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ __forceinline__ void await_count(const u32* counter, u32 all) {
  u32 seen;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  while (seen < all);
}

// -- clusters: blocks that write into each other's shared memory --------------------------------------------------

__device__ __forceinline__ void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }

// Until all threads of the cluster have arrived.
__device__ __forceinline__ void await_cluster() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// What this block has at an address, in another block of the cluster.
__device__ __forceinline__ u32 of_other(u32 address, int rank) {
  u32 other;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(other) : "r"(address), "r"(rank));
  return other;
}

// 16 bytes to another block, counted by a barrier of its own.
__device__ __forceinline__ void give(u32 to, float a, float b, float c, float d, u32 barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];"
               ::"r"(to), "f"(a), "f"(b), "f"(c), "f"(d), "r"(barrier) : "memory");
}

// -- loads --------------------------------------------------------------------------------------------------------

// What other blocks wrote: past the first-level cache.
__device__ __forceinline__ float4 load_four(const float4* p) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ u32 load_two(const half_t* p) {
  u32 v;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// Boxes of DEPTH times 64 inputs, from the 64 times `inputs`th on: of x, all its rows; of a weight, rows from `row` on; of a
// gated one, as many of the gate, and then as many of the up projection.
__device__ __forceinline__ void bring_box(u32 to, const TensorMap* map, int inputs, int row, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
               " [%0], [%1, {%3, %4, %5}], [%2];"
               ::"r"(to), "l"(map), "r"(barrier), "r"(0), "r"(row), "r"(inputs) : "memory");
}

__device__ __forceinline__ void bring_weight_box(u32 to, const TensorMap* map, int inputs, int row, u32 barrier, u64 policy) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
               " [%0], [%1, {%3, %4, %5}], [%2], %6;"
               ::"r"(to), "l"(map), "r"(barrier), "r"(0), "r"(row), "r"(inputs), "l"(policy) : "memory");
}

__device__ __forceinline__ void bring_gated_box(u32 to, const TensorMap* map, int inputs, int row, u32 barrier, u64 policy) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
               " [%0], [%1, {%3, %4, %3, %5}], [%2], %6;"
               ::"r"(to), "l"(map), "r"(barrier), "r"(0), "r"(row), "r"(inputs), "l"(policy) : "memory");
}

// -- products of four warps: 64 rows of x times N of the weight -----------------------------------------------------

// What lies there in rows of 128 bytes, swizzled: atoms of 8 rows follow each other.
__device__ __forceinline__ u64 operand(u32 address) {
  return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until no more than LEFT groups of products are under way.
template <int LEFT> __device__ __forceinline__ void await_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// The compiler may not move what it does with sums into the time of the products.
template <int COUNT> __device__ __forceinline__ void keep(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d += x * w, 16 inputs.
template <int N> __device__ __forceinline__ void multiply(float (&d)[N / 2], u64 x, u64 w);
