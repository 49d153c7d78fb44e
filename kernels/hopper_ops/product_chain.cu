// The matrix products between two attentions in one launch, at the speed of memory, on Hopper: o, gate and up, down, and
// the next layer's qkv or the vocabulary, of up to 64 rows.
//
//   product   out[m][n] = f(sum_k x[m][k] * w[n][k]); the next begins when all blocks have ended it
//   block     one per multiprocessor, all resident
//   item      of a product: a tile of up to 256 rows of the weight, and one of some parts of k; a block has every
//             `gridDim.x`th. x is the left operand of the matrix units, whose 64 rows it may leave empty; a tile the right one
//   unit      of an item: some times 64 inputs of its rows, and the same inputs of x: each in a ring
//   join      of the parts of a tile's sums: each block finishes a share of the columns, out of what all have made; a tile's
//             blocks are of one cluster and write into each other's shared memory, or else into memory
//
// One warp brings weights into their ring by TMA and runs ahead of everybody: weights depend on nothing, so memory is
// busy while a product ends, and while the attention before this launch does. A second warp brings x when the product
// before has ended, a third finds the factors of the rows' RMS norm; two teams of four multiply, each by half of a tile, or
// by all of a small one every other unit. Sums are added in a fixed order: the same step gives the same bits.
//
// Compiled by NVRTC (product_chain.py) with
//   HALF 0: bfloat16, 1: float16;  ROWS of x: 16, 32 or 64;  bytes of shared memory: W_BYTES and X_BYTES of the rings,
//   EXCHANGED by teams, and then what a cluster's blocks give each other;
//   CLUSTER: blocks of one, 1: none;
//   TILES: of each product the rows of the weight in a tile;  DEPTHS: times 64 inputs of a unit;  SPLITS: parts of k;
//   TRACE, if defined: times (`trace`)
//
// Layouts: PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16", "Matrix Descriptor Format" (128-byte swizzle).

#include "finish.cuh"
#include "joins.cuh"
#include "multiply.cuh"
#include "rings.cuh"

// One thread.
__device__ __forceinline__ void bring_weights(const Chain& c, const Ring& ring, u32* starts) {
  Room room(ring.empty, starts, W_BYTES);
  u64 policy = streaming_policy();
#pragma unroll 1
  for (int index = 0; index < c.num_products; ++index) {
    const Product& p = c.products[index];
    bool gated = p.which == GATE_UP;
    int rows = tiles[p.which], depth = depths[p.which], bytes = weight_bytes(p.which), boxes = is_small(p.which) ? 1 : TEAMS;
#pragma unroll 1
    for (Walk at(p); at.goes_on(); at.advance()) {
      Part part(p, at.item);
#pragma unroll 1
      for (int i = 0; i < part.count; ++i, part.advance()) {
        u32 first = ring.w_first + room.take(bytes), barrier = ring.weights + 8 * ((room.head - 1) % QUEUE);
        arrive_expecting(barrier, bytes);
        for (int team = 0; team < boxes; ++team) {
          u32 to = first + team * (bytes / boxes);
          int row = part.tile * boxes + team;
          if (gated) bring_gated_box(to, &p.w, part.unit * depth, row * (rows / boxes / 2), barrier, policy);
          else bring_weight_box(to, &p.w, part.unit * depth, row * (rows / boxes), barrier, policy);
        }
      }
    }
  }
}

// One thread. `begun`: a barrier that tells, for each product, that what it reads is there.
__device__ __forceinline__ void bring_x(const Chain& c, const Ring& ring, u32* starts, u32 begun) {
  Room room(ring.empty, starts, X_BYTES);
  await_launches();
#pragma unroll 1
  for (int index = 0; index < c.num_products; ++index) {
    const Product& p = c.products[index];
    if (index > 0) await_count(ended(c, index - 1), gridDim.x);
    STAMP(true, 0);
    asm volatile("fence.proxy.async.global;" ::: "memory");
    arrive(begun);
    if (index + 1 == c.num_products) let_launch();
    int depth = depths[p.which], bytes = x_bytes(p.which);
#pragma unroll 1
    for (Walk at(p); at.goes_on(); at.advance()) {
      Part part(p, at.item);
#pragma unroll 1
      for (int i = 0; i < part.count; ++i, part.advance()) {
        u32 to = ring.x_first + room.take(bytes), barrier = ring.rows + 8 * ((room.head - 1) % QUEUE);
        arrive_expecting(barrier, bytes);
        bring_box(to, &p.x, part.unit * depth, 0, barrier);
      }
    }
  }
}

// One warp: the factors of the rows' RMS norm, of every other product in the same place.
__device__ __forceinline__ void find_factors(const Chain& c, float (&factors)[2][ROWS], u32 begun, u32 found) {
  constexpr int LANES = ROWS / 4, PARTS = 32 / LANES, DEEP = 8;  // a lane has four rows
  int lane = threadIdx.x % 32, row = lane % LANES * 4;
  await_launches();
  for (int i = blockIdx.x * 32 + lane; i < COUNTERS; i += gridDim.x * 32) c.others[i] = 0;
#pragma unroll 1
  for (int index = 0; index < c.num_products; ++index) {
    const Product& p = c.products[index];
    await_together(begun, index & 1);
    if (p.squares) {
      float total[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
      for (int part = lane / LANES; part < p.num_squares; part += PARTS * DEEP) {
        float4 v[DEEP];
#pragma unroll
        for (int i = 0; i < DEEP; ++i) {
          int at = part + i * PARTS;
          v[i] = load_four((const float4*)(p.squares + min(at, p.num_squares - 1) * ROWS + row));
          if (at >= p.num_squares) v[i] = {0.f, 0.f, 0.f, 0.f};
        }
#pragma unroll
        for (int i = 0; i < DEEP; ++i) { total[0] += v[i].x; total[1] += v[i].y; total[2] += v[i].z; total[3] += v[i].w; }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int apart = LANES; apart < 32; apart *= 2) total[j] += __shfl_xor_sync(~0u, total[j], apart);
        if (lane < LANES) factors[index & 1][row + j] = rsqrtf(total[j] / (float)p.k + c.eps);
      }
    }
    __syncwarp();
    if (lane == 0) arrive(found);
  }
}

template <int WHICH>
__device__ __forceinline__ void multiply_product(const Chain& c, int index, Ring& ring, const float* factors, u32 found, float4* pool, Bell& bell) {
  using Mine = Columns<WHICH>;
  constexpr int DEPTH = depths[WHICH], SPLIT = Mine::SPLIT, EIGHTS = Mine::EIGHTS;
  constexpr bool SHARED = is_small(WHICH);  // by both teams
  constexpr int N = SHARED ? tiles[WHICH] : tiles[WHICH] / TEAMS;
  constexpr bool ADDS = WHICH == O || WHICH == DOWN;
  constexpr int W_UNIT = weight_bytes(WHICH), X_UNIT = x_bytes(WHICH);
  // A unit is freed when the one behind it is there: wherever in a ring they are, both fit.
  constexpr int UNITS = SHARED ? 1 : 3;
  static_assert(UNITS * W_UNIT <= W_BYTES && UNITS * X_UNIT <= X_BYTES, "a ring would wait for itself");
  const Product& p = c.products[index];
  int warp = uniform_warp(), lane = threadIdx.x % 32;
  bool has_rows = warp % 4 * 16 < ROWS, knows_factors = false;
  auto free_unit = [&](int unit) {  // read by the matrix units alone, as TMA writes: no fence is due
    __syncwarp();
    if (lane == 0) arrive(ring.empty + 8 * unit);
  };
#pragma unroll 1
  for (Walk at(p); at.goes_on(); at.advance()) {
    Part part(p, at.item);
    Mine mine(part);
    float d[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) d[i] = 0.f;
    Before before[ADDS ? Mine::MOST : 1];
    if (ADDS && has_rows)
#pragma unroll
      for (int i = 0; i < Mine::MOST; ++i) before[i].load(p, c.num_rows, mine.column(mine.begin + i));
    keep(d);
    int last = 0;
#pragma unroll 1
    for (int i = 0; i < part.count; ++i, ring.advance(W_UNIT, X_UNIT)) {
      ring.place(W_UNIT, X_UNIT);
      await(ring.weights + 8 * ring.unit, ring.parity);
      await_together(ring.rows + 8 * ring.unit, ring.parity);
      STAMP(threadIdx.x == 0 && i == 0 && at.item < gridDim.x, 1);
      u32 x = ring.x(), w = ring.w() + (SHARED ? 0 : warp / 4 * (W_UNIT / TEAMS));
      auto multiply_unit = [&] {
        begin_products();
#pragma unroll
        for (int j = 0; j < 4 * DEPTH; ++j)  // 16 inputs, 32 bytes further each; x beyond its rows is whatever lies there
          multiply<N>(d, operand(x + j / 4 * ROWS * ROW_BYTES) + j % 4 * 2, operand(w + j / 4 * N * ROW_BYTES) + j % 4 * 2);
        end_products();
      };
      if constexpr (SHARED) {
        if (i % TEAMS == warp / 4) {
          multiply_unit();
          await_products<0>();
        }
        free_unit(ring.unit);
      } else {
        multiply_unit();
        await_products<1>();  // those of the unit before
        if (i > 0) free_unit(last);
        last = ring.unit;
      }
    }
    await_products<0>();
    keep(d);
    if (!SHARED) free_unit(last);
    STAMP(threadIdx.x == 0, 2);
    if (!knows_factors) await_together(found, index & 1);
    knows_factors = true;
    if constexpr (SHARED) exchange(d, pool, has_rows);
    if (!has_rows) continue;

    Four sums[Mine::MOST];
    if constexpr (SPLIT == 1) {
#pragma unroll
      for (int i = 0; i < EIGHTS; ++i) sums[i] = {d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]};
    } else if constexpr (CLUSTER > 1) {
      if (!bell.met) await_cluster();
      bell.met = true;
      ClusterJoin<WHICH>::join(d, part.split, bell.pool, bell.barrier, bell.parity, sums);
      STAMP(threadIdx.x == 0, 3);
      STAMP(threadIdx.x == 0, 4);
      bell.parity ^= 1;
    } else {
      join_in_memory<WHICH>(c, index, at.item, warp, part, mine, d, sums);
    }

    if constexpr (WHICH == GATE_UP) {
#pragma unroll
      for (int i = 0; i < EIGHTS / 2; ++i) finish_gated(p, c.num_rows, factors, mine.column(i), sums[i], sums[i + EIGHTS / 2]);
    } else {
      float squares[2] = {0.f, 0.f};
#pragma unroll
      for (int i = 0; i < Mine::MOST; ++i) {
        if (SPLIT > 1 && mine.begin + i >= mine.end) break;
        int n = mine.column(mine.begin + i);
        if constexpr (ADDS) finish_adds(p, c.num_rows, n, sums[i], before[i], squares);
        else if constexpr (WHICH == QKV) finish_normed<half_t>(p, c.num_rows, factors, n, sums[i]);
        else finish_normed<float>(p, c.num_rows, factors, n, sums[i]);
      }
      if (ADDS) tell_squares(p, at.item, squares);
    }
  }
  if (!knows_factors) await_together(found, index & 1);
  meet();
  STAMP(threadIdx.x == 0, 5);
  if (threadIdx.x == 0 && index + 1 < c.num_products) count(ended(c, index));
}

extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1) product_chain(const __grid_constant__ Chain c) {
  extern __shared__ __align__(1024) char raw[];
  __shared__ float factors[2][ROWS];
  __shared__ u64 barriers[3 * QUEUE + 3];
  __shared__ u32 starts[2][QUEUE];
  int thread = threadIdx.x, warp = uniform_warp();
  u32 first = shared_address(barriers), begun = first + 24 * QUEUE, found = begun + 8;
  u32 w_first = shared_address(raw);
  Ring ring{w_first, w_first + W_BYTES, first, first + 8 * QUEUE, first + 16 * QUEUE, 0, 0, 0, 0};
  if (thread == 0) {
    if (w_first & 1023) asm volatile("trap;");
    for (int i = 0; i < QUEUE; ++i) {
      make_barrier(ring.weights + 8 * i, 1);
      make_barrier(ring.rows + 8 * i, 1);
      make_barrier(ring.empty + 8 * i, WARPS);
    }
    make_barrier(begun, 1);
    make_barrier(found, 1);
    make_barrier(found + 8, 1);
    publish_barriers();
  }
  __syncthreads();
  if (CLUSTER > 1) arrive_at_cluster();
  if (warp == BRINGS_WEIGHTS) {
    if (thread % 32 == 0) bring_weights(c, ring, starts[0]);
  } else if (warp == BRINGS_X) {
    if (thread % 32 == 0) bring_x(c, ring, starts[1], begun);
  } else if (warp == FINDS_FACTORS) {
    find_factors(c, factors, begun, found);
  } else {
    await_launches();
    float4* pool = (float4*)(raw + W_BYTES + X_BYTES);
    Bell bell{found + 8, shared_address(pool) + EXCHANGED, 0, false};
#pragma unroll 1
    for (int index = 0; index < c.num_products; ++index) {
      int which = c.products[index].which;
      const float* mine = factors[index & 1];
      if (which == QKV) multiply_product<QKV>(c, index, ring, mine, found, pool, bell);
      else if (which == O) multiply_product<O>(c, index, ring, mine, found, pool, bell);
      else if (which == GATE_UP) multiply_product<GATE_UP>(c, index, ring, mine, found, pool, bell);
      else if (which == DOWN) multiply_product<DOWN>(c, index, ring, mine, found, pool, bell);
      else multiply_product<VOCABULARY>(c, index, ring, mine, found, pool, bell);
    }
  }
}
