// Attention of one new token of each of up to 64 rows over paged K and V, at the speed of memory, on Hopper.
//
//   tile      16 keys of all KV heads, and their values: contiguous in a page, a slot of the ring
//   row       its keys' tiles, the one that the new token belongs to included
//   block     an equal share of all rows' tiles, in order (`Shares`): the end of a row, whole ones, the beginning of one
//   part      of a row that several blocks have; the last of them to end adds them up, in order
//
// One warp brings tiles into the ring by TMA. It begins before the launch before this one has ended, since K and V
// of older tokens are there. A warp for each KV head multiplies: keys on the left, 16 at a time, the head's queries on the
// right (8 columns, of which it may use fewer); the sums are dimensions on the left and queries on the right, so that
// scores and sums of a query are in the same threads.
// The new token's key and value are put into the tile in shared memory as well as into their page: nobody reads what is just
// being written. What is no number yet beyond them counts as zero.
//
// Compiled by NVRTC (page_attention.py) with
//   HALF 0: bfloat16, 1: float16;  HEAD_DIM, GROUP (query heads of a KV head, 8 at most), KV_HEADS, QK_NORM;
//   STAGES of the ring, blocks PER_MULTIPROCESSOR;  TRACE, if defined: times (`trace`)
//
// Layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16", "movmatrix" and "Swizzling Modes" of tensor copies (128 bytes).

#include "new_tokens.cuh"
#include "sums.cuh"

struct Ring {
  u32 slots, full, empty;
  int stage, parity;
  __device__ u32 slot() const { return slots + stage * SLOT; }
  __device__ void advance() {
    if (++stage == STAGES) { stage = 0; parity ^= 1; }
  }
};

__device__ __forceinline__ void bring_tile(u32 to, const TensorMap* map, int token, u32 barrier, u64 policy) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
               " [%0], [%1, {%3, %4, %3, %3}], [%2], %5;"
               ::"r"(to), "l"(map), "r"(barrier), "r"(0), "r"(token), "l"(policy) : "memory");
}

// One warp.
__device__ __forceinline__ void bring_tiles(const Attention& a, const Shares& shares, Ring ring) {
  int lane = threadIdx.x % 32;
  u64 policy = streaming_policy();
  let_launch();
#pragma unroll 1
  for (int base = shares.begin; base < shares.end; base += 32) {
    int token = shares.place_of(a.rows, min(base + lane, shares.end - 1));
    int count = min(32, shares.end - base);
#pragma unroll 1
    for (int i = 0; i < count; ++i, ring.advance()) {
      int at = __shfl_sync(~0u, token, i);
      if (lane == 0) {
        await(ring.empty + 8 * ring.stage, ring.parity ^ 1);
        STAMP(base + i == shares.begin, 1);
        STAMP(base + i + 1 == shares.end, 2);
        u32 barrier = ring.full + 8 * ring.stage;
        arrive_expecting(barrier, SLOT);
        bring_tile(ring.slot(), &a.k, at, barrier, policy);
        bring_tile(ring.slot() + TILE_BYTES, &a.v, at, barrier, policy);
      }
      __syncwarp();
    }
  }
}

__device__ __forceinline__ bool counts() { return threadIdx.x % 4 * 2 < GROUP; }  // a thread with queries

__device__ __forceinline__ void write_part(const Attention& a, int part, int head, const Sums& sums) {
  int lane = threadIdx.x % 32;
  u64 place = (u64)part * KV_HEADS + head;
  if (counts())
#pragma unroll
    for (int i = 0; i < STEPS; ++i)
      a.parts[(place * STEPS + i) * 32 + lane] = {sums.of[i][0], sums.of[i][1], sums.of[i][2], sums.of[i][3]};
  if (lane < 4) a.stats[place * 4 + lane] = {sums.best[0], sums.best[1], sums.total[0], sums.total[1]};
}

// All parts of a row's head, in order; `mine` is this block's. Several are on their way at a time.
__device__ __forceinline__ void add_parts(const Attention& a, const RowParts& parts, int head, Sums& mine) {
  constexpr int TOGETHER = 16 / STEPS;  // what registers have room for
  int lane = threadIdx.x % 32;
  Sums sums;
  sums.clear();
#pragma unroll 1
  for (int first = parts.first; first <= parts.last; first += TOGETHER) {
    float4 v[TOGETHER][STEPS], stats[TOGETHER];
#pragma unroll
    for (int t = 0; t < TOGETHER; ++t) {
      int block = min(first + t, parts.last);
      u64 place = (u64)parts.place(block) * KV_HEADS + head;
      if (block == (int)blockIdx.x) {
        stats[t] = {mine.best[0], mine.best[1], mine.total[0], mine.total[1]};
#pragma unroll
        for (int i = 0; i < STEPS; ++i) v[t][i] = {mine.of[i][0], mine.of[i][1], mine.of[i][2], mine.of[i][3]};
      } else {
        stats[t] = load_four(a.stats + place * 4 + lane % 4);
#pragma unroll
        for (int i = 0; i < STEPS; ++i) v[t][i] = counts() ? load_four(a.parts + (place * STEPS + i) * 32 + lane) : float4{0.f, 0.f, 0.f, 0.f};
      }
    }
#pragma unroll
    for (int t = 0; t < TOGETHER; ++t) {
      if (first + t > parts.last) break;
      float best[2] = {fmaxf(sums.best[0], stats[t].x), fmaxf(sums.best[1], stats[t].y)};
      float shrink[2] = {power_of_two(sums.best[0] - best[0]), power_of_two(sums.best[1] - best[1])};
      float factor[2] = {power_of_two(stats[t].x - best[0]), power_of_two(stats[t].y - best[1])};
      sums.shrink(shrink);
      sums.total[0] += factor[0] * stats[t].z;
      sums.total[1] += factor[1] * stats[t].w;
#pragma unroll
      for (int i = 0; i < STEPS; ++i) {
        sums.of[i][0] += factor[0] * v[t][i].x;
        sums.of[i][1] += factor[1] * v[t][i].y;
        sums.of[i][2] += factor[0] * v[t][i].z;
        sums.of[i][3] += factor[1] * v[t][i].w;
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) sums.best[j] = best[j];
    }
  }
  mine = sums;
}

// A warp, whose head it is.
__device__ __forceinline__ void attend(const Attention& a, const Shares& shares, Ring ring, int head) {
  int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int tile = shares.begin; tile < shares.end;) {
    int row = shares.row_of(tile), first = shares.starts[row], behind = shares.starts[row + 1];
    int end = min(shares.end, behind), position = shares.positions[row];
    RowParts parts(shares, row);
    u32* arrived = a.arrivals + row * KV_HEADS + head;
    u32 seen = 0;
    u32 q[STEPS][2];
    load_queries(a, row, head, position, q);
    Sums sums;
    sums.clear();
#pragma unroll 1
    for (; tile < end; ++tile, ring.advance()) {
      // Whether all others have ended: asked before the last tile, while it is on its way.
      if (tile + 1 == end && lane == 0) asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
      u32 keys = ring.slot() + head * HEAD_BYTES, values = keys + TILE_BYTES;
      await_together(ring.full + 8 * ring.stage, ring.parity);
      STAMP(threadIdx.x == 0 && tile == shares.begin, 4);
      STAMP(threadIdx.x == 0 && tile + 1 == shares.end, 5);
      if (tile + 1 == behind) put_new(a, row, head, position, keys, values);
      sums.add(q, keys, values, position + 1 - (tile - first) * TILE, a.scale_log2);
      release(ring.empty + 8 * ring.stage);
    }
    sums.complete();
    u32 others = parts.last - parts.first;
    bool closes = others == 0;
    if (!closes) {
      closes = __shfl_sync(~0u, seen, 0) == others;
      if (!closes) {
        write_part(a, parts.place(blockIdx.x), head, sums);
        __syncwarp();
        if (lane == 0)
          asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(seen) : "l"(arrived) : "memory");
        closes = __shfl_sync(~0u, seen, 0) == others;
      }
      if (closes) {
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
        __syncwarp();
        if (lane == 0) *arrived = 0;
        add_parts(a, parts, head, sums);
      }
    }
    if (closes) sums.store(a.out + ((u64)row * HEADS + head * GROUP) * HEAD_DIM);
  }
  STAMP(threadIdx.x == 0, 6);
}

extern "C" __global__ void __launch_bounds__(THREADS, PER_MULTIPROCESSOR) page_attention(const __grid_constant__ Attention a) {
  extern __shared__ __align__(1024) char raw[];
  __shared__ u64 barriers[2 * STAGES];
  __shared__ Shares shares;
  int thread = threadIdx.x, warp = uniform_warp();
  u32 first = shared_address(barriers);
  STAMP(thread == 0, 0);
  Ring ring{shared_address(raw), first, first + 8 * STAGES, 0, 0};
  if (thread == 0) {
    if (ring.slots & 1023) asm volatile("trap;");
    for (int i = 0; i < STAGES; ++i) {
      make_barrier(ring.full + 8 * i, 1);
      make_barrier(ring.empty + 8 * i, KV_HEADS);
    }
    publish_barriers();
  }
  if (warp == KV_HEADS) shares.find(a.rows);
  __syncthreads();
  if (warp == KV_HEADS) {
    bring_tiles(a, shares, ring);
  } else {
    await_launches();
    STAMP(thread == 0, 3);
    attend(a, shares, ring, warp);
  }
}
