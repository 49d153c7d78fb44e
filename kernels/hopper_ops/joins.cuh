// How the parts of a tile's sums become one in `product_chain.cu`: of a block's teams, and of a cluster's blocks.
#pragma once

#include "finish.cuh"

// Each team has summed a part of the units. Afterwards a thread has the sums of its team's half of the columns first.
template <int COUNT> __device__ __forceinline__ void exchange(float (&d)[COUNT], float4* pool, bool has_rows) {
  constexpr int EACH = COUNT / 4 / TEAMS, LANES = ROWS / 16 * 32;
  int lane = threadIdx.x % 128;
  bool second = team() > 0;
  meet();  // others may still read what was exchanged before
  if (has_rows)
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      float given[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) given[j] = second ? d[4 * i + j] : d[4 * (EACH + i) + j];
      pool[((second ? 0 : EACH) + i) * LANES + lane] = {given[0], given[1], given[2], given[3]};
    }
  meet();
  if (has_rows)
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      float4 theirs = pool[((second ? EACH : 0) + i) * LANES + lane];
      float added[4] = {theirs.x, theirs.y, theirs.z, theirs.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) d[4 * i + j] = (second ? d[4 * (EACH + i) + j] : d[4 * i + j]) + added[j];
    }
}

// The columns of an item that a thread finishes, in eights of its team's half of the tile: all, or of parts a share.
template <int WHICH> struct Columns {
  static constexpr int EIGHTS = tiles[WHICH] / 8 / TEAMS, SPLIT = all_splits[WHICH], MOST = (EIGHTS + SPLIT - 1) / SPLIT;
  int begin, end, first;
  static __device__ constexpr int begin_of(int split) { return EIGHTS * split / SPLIT; }
  __device__ Columns(const Part& part) {
    begin = begin_of(part.split);
    end = begin_of(part.split + 1);
    first = (part.tile * TEAMS + team()) * (WHICH == GATE_UP ? EIGHTS / 2 : EIGHTS);
  }
  __device__ int column(int eight) const { return 8 * (first + eight) + threadIdx.x % 4 * 2; }
};

// What tells a block that others' parts are there; each of its products has a turn, and one item at most. Barriers are awaited
// with the default scope: what a wider one adds is of the first-level cache, which shared memory is not in.
struct Bell {
  u32 barrier, pool;
  int parity;
  bool met;  // the others of the cluster are there
};

// How the parts of a tile's sums are joined within a cluster.
template <int WHICH> struct ClusterJoin {
  using Mine = Columns<WHICH>;
  static constexpr int SPLIT = Mine::SPLIT, MOST = Mine::MOST, EIGHTS = Mine::EIGHTS;
  static constexpr int HAVE_ROWS = ROWS / 16 * 32 * TEAMS;  // threads
  static_assert(CLUSTER % SPLIT == 0, "the blocks of a tile are of one cluster");

  // A block's place for the others' sums: [SPLIT - 1][MOST][THREADS].
  static __device__ __forceinline__ int place_of(int from, int to) {
    return ((from < to ? from : from - 1) * MOST * THREADS + (int)threadIdx.x) * 16;
  }

  // Gives the others what is theirs, and returns what is this block's, out of all parts in their order.
  template <int COUNT>
  static __device__ __forceinline__ void join(const float (&d)[COUNT], int split, u32 pool, u32 barrier, int parity, Four (&sums)[MOST]) {
    int rank = blockIdx.x % CLUSTER - split, count = Mine::begin_of(split + 1) - Mine::begin_of(split);
    if (threadIdx.x == 0) arrive_expecting(barrier, (SPLIT - 1) * count * HAVE_ROWS * 16);
    Four own[MOST];
#pragma unroll
    for (int i = 0; i < MOST; ++i) own[i] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int to = 0; to < SPLIT; ++to) {
      u32 theirs = of_other(pool + place_of(split, to), rank + to), bell = of_other(barrier, rank + to);
#pragma unroll
      for (int i = 0; i < Mine::begin_of(to + 1) - Mine::begin_of(to); ++i) {
        int at = 4 * (Mine::begin_of(to) + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) own[i].v[j] = to == split ? d[at + j] : own[i].v[j];
        if (to != split) give(theirs + i * THREADS * 16, d[at], d[at + 1], d[at + 2], d[at + 3], bell);
      }
    }
    await_together(barrier, parity);
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
      sums[i] = {0.f, 0.f, 0.f, 0.f};
      if (i >= count) break;
#pragma unroll
      for (int from = 0; from < SPLIT; ++from) {
        Four one = own[i];
        if (from != split) one = taken(pool + place_of(from, split) + i * THREADS * 16);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i].v[j] += one.v[j];
      }
    }
  }

  static __device__ __forceinline__ Four taken(u32 from) {
    Four one;
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(one.v[0]), "=f"(one.v[1]), "=f"(one.v[2]), "=f"(one.v[3]) : "r"(from) : "memory");
    return one;
  }
};

// The same of blocks anywhere, through memory: each writes all of its sums there, and reads the others' of its share.
template <int WHICH, int COUNT>
__device__ __forceinline__ void join_in_memory(const Chain& c, int index, int item, int warp, const Part& part, const Columns<WHICH>& mine,
                                               const float (&d)[COUNT], Four (&sums)[Columns<WHICH>::MOST]) {
  using Mine = Columns<WHICH>;
  constexpr int SPLIT = Mine::SPLIT, EIGHTS = Mine::EIGHTS;
  float4* to = c.parts + (u64)item * EIGHTS * THREADS + threadIdx.x;
#pragma unroll
  for (int i = 0; i < EIGHTS; ++i) to[i * THREADS] = {d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]};
  __syncwarp();
  // A warp has the same rows in all blocks: it waits for those warps only.
  if (threadIdx.x % 32 == 0) {
    u32* counter = joined(c, index, part.tile, warp);
    count(counter);
    STAMP(threadIdx.x == 0, 3);
    await_count(counter, SPLIT);
  }
  __syncwarp();
  STAMP(threadIdx.x == 0, 4);
  const float4* from = c.parts + ((u64)part.tile * SPLIT * EIGHTS + mine.begin) * THREADS + threadIdx.x;
  float4 v[Mine::MOST][SPLIT];
#pragma unroll
  for (int i = 0; i < Mine::MOST; ++i)
#pragma unroll
    for (int split = 0; split < SPLIT; ++split)
      v[i][split] = load_four(from + (split * EIGHTS + min(i, mine.end - 1 - mine.begin)) * THREADS);
#pragma unroll
  for (int i = 0; i < Mine::MOST; ++i) {
    sums[i] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int split = 0; split < SPLIT; ++split) {
      const float4& one = v[i][split];
      sums[i].v[0] += one.x; sums[i].v[1] += one.y; sums[i].v[2] += one.z; sums[i].v[3] += one.w;
    }
  }
}
