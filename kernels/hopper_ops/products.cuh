// Matrix products of few rows: the part of the warps that multiply.
#pragma once

#include "step.cuh"

__device__ __forceinline__ void store_out(const Phase& p, int m, int n, float value) {
  if (p.out_f32) ((float*)p.out)[(u64)m * p.n + n] = value;
  else ((half_t*)p.out)[(u64)m * p.n + n] = narrow(value);
}

// Sums of 16 rows of the weight: a lane has rows lane / 4 and 8 more, of x rows 2 * (lane % 4) + e, at d[e] and d[2 + e].
__device__ __forceinline__ void finish_normed(const float (&d)[REGS], int tile, const Phase& p, int num_rows,
                                              const float* factor) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < REGS; ++i) {
    int m = 2 * (lane % 4) + i % 2, n = tile * TILE + lane / 4 + 8 * (i / 2);
    if (m < num_rows) store_out(p, m, n, d[i] * factor[m] + (p.bias ? widen(p.bias[n]) : 0.f));
  }
}

// The same outputs in words: four neighbours of a row lie in four lanes, of which each writes one of their four words.
__device__ __forceinline__ void finish_in_words(const float (&d)[REGS], int tile, const Phase& p, int num_rows,
                                                const float* factor, u64 tag) {
  int lane = threadIdx.x % 32, quarter = lane / 4 % 4;
  u64 mine = 0;
#pragma unroll
  for (int i = 0; i < REGS; ++i) {
    int m = 2 * (lane % 4) + i % 2, n = tile * TILE + lane / 4 + 8 * (i / 2);
    u32 one = narrow(d[i] * factor[m] + (p.bias ? widen(p.bias[n]) : 0.f));
    u32 other = __shfl_xor_sync(0xffffffffu, one, 4);
    u32 two = lane & 4 ? other | one << 16 : one | other << 16;
    u32 others = __shfl_xor_sync(0xffffffffu, two, 8);
    u64 four = lane & 8 ? others | (u64)two << 32 : two | (u64)others << 32;
    if (quarter == i) mine = four;
  }
  int m = 2 * (lane % 4) + quarter % 2, n = tile * TILE + lane / 16 * 4 + 8 * (quarter / 2);
  if (m < num_rows) publish((Word*)p.out + ((u64)m * p.n + n) / 4, mine, tag);
}

__device__ __forceinline__ void finish_gated(const float (&d)[REGS], int tile, const Phase& p, int num_rows,
                                             const float* factor) {
  int lane = threadIdx.x % 32, n = tile * (TILE / 2) + lane / 4;
  float gate_bias = p.bias ? widen(p.bias[n]) : 0.f, up_bias = p.bias ? widen(p.bias[p.n + n]) : 0.f;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    int m = 2 * (lane % 4) + e;
    float gate = d[e] * factor[m] + gate_bias, up = d[2 + e] * factor[m] + up_bias;
    if (m < num_rows) store_out(p, m, n, gate / (1.f + __expf(-gate)) * up);
  }
}

// What a tile's sums are added to: loaded before they are known.
struct Before {
  float residual[REGS], gain[2];

  __device__ __forceinline__ void load(int tile, const Phase& p, int num_rows) {
    int lane = threadIdx.x % 32, first = tile * TILE + lane / 4;
#pragma unroll
    for (int i = 0; i < REGS; ++i) {
      int m = 2 * (lane % 4) + i % 2, n = first + 8 * (i / 2);
      residual[i] = m < num_rows ? widen(load_half(p.residual + (u64)m * p.n + n)) : 0.f;
      if (p.bias) residual[i] += widen(p.bias[n]);
    }
    gain[0] = widen(p.gain[first]);
    gain[1] = widen(p.gain[first + 8]);
  }
};

__device__ __forceinline__ void finish_adds(const float (&d)[REGS], const Before& before, int tile, const Phase& p,
                                            int num_rows) {
  int lane = threadIdx.x % 32, first = tile * TILE + lane / 4;
  float squares[2] = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < REGS; ++i) {
    int m = 2 * (lane % 4) + i % 2, n = first + 8 * (i / 2);
    half_t stored = narrow(before.residual[i] + d[i]);
    float after = widen(stored);
    if (m < num_rows) {
      p.residual[(u64)m * p.n + n] = stored;
      store_out(p, m, n, after * before.gain[i / 2]);
      squares[i % 2] += after * after;
    }
  }
#pragma unroll
  for (int e = 0; e < 2; ++e) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) squares[e] += __shfl_xor_sync(0xffffffffu, squares[e], step);
    int m = 2 * lane + e;
    if (lane < 4 && m < num_rows) p.squares_out[m * (p.n / TILE) + tile] = squares[e];
  }
}

__device__ __forceinline__ void find_factors(float* factor, float* pool, const Phase& p, int num_rows, float eps) {
  int thread = threadIdx.x;
  float total[MAX_ROWS];
#pragma unroll
  for (int m = 0; m < MAX_ROWS; ++m)
    total[m] = m < num_rows && thread < p.num_squares ? load_float(p.squares + m * p.num_squares + thread) : 0.f;
  for (int i = thread + THREADS; i < p.num_squares; i += THREADS)
#pragma unroll
    for (int m = 0; m < MAX_ROWS; ++m)
      if (m < num_rows) total[m] += load_float(p.squares + m * p.num_squares + i);
#pragma unroll
  for (int m = 0; m < MAX_ROWS; ++m) {
    if (m >= num_rows) break;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) total[m] += __shfl_xor_sync(0xffffffffu, total[m], step);
    if (thread % 32 == 0) pool[m * WARPS + thread / 32] = total[m];
  }
  meet();
  if (thread < num_rows) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) sum += pool[thread * WARPS + i];
    factor[thread] = rsqrtf(sum / p.k + eps);
  }
  meet();
}

// Where a lane finds its rows of the matrices of 16 inputs, in a unit whose `rows` are 128 bytes of 64 inputs each,
// swizzled; `first` is the row that the lane would have among the unit's first.
__device__ __forceinline__ u32 place_in_unit(int first, int rows, int sixteen, int half) {
  int row = sixteen / 4 * rows + first;
  return row * 128 + ((2 * (sixteen % 4) + half ^ row & 7) << 4);
}

__device__ __forceinline__ void multiply_phase(const Step& s, const Phase& p, Ring& ring, float* factor, float* pool,
                                               const Turn& turn, int index) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, units = (p.k + BK - 1) / BK, slice = warp % SHARING, team = warp / SHARING;
  int b_row = min(lane % 8, s.num_rows - 1);
  constexpr int STEPS = BK / 16 / SHARING;
  u32 a_place[STEPS], b_place[STEPS / 2];  // one load brings 16 rows of 16 inputs of the weight; 8 of 32 of x
#pragma unroll
  for (int i = 0; i < STEPS; ++i) a_place[i] = place_in_unit(lane % 16, TILE, STEPS * slice + i, lane / 16);
#pragma unroll
  for (int i = 0; i < STEPS / 2; ++i)
    b_place[i] = A_BYTES + place_in_unit(b_row, s.num_rows, STEPS * slice + 2 * i + lane / 16, lane / 8 % 2);
  Share share(p);
  if (p.kind != ADDS) find_factors(factor, pool, p, s.num_rows, s.eps);
  STAMP(true, 1);
#pragma unroll 1
  for (int done = 0; done < share.count; done += TILES) {
    int tiles = min(TILES, share.count - done), tile = share.tile + done + warp;  // of those that finish
    bool finishes = warp < tiles;
    Before before;
    if (p.kind == ADDS && finishes) before.load(tile, p, s.num_rows);
    float d[TILES][REGS];
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int i = 0; i < REGS; ++i) d[t][i] = 0.f;
#pragma unroll 1
    for (int unit = 0; unit < units; ++unit, ring.advance()) {
      if (unit % TEAMS != team) continue;
      u32 slot = ring.slots + ring.stage * SLOT, b[STEPS / 2][4];
      // Weights first: those of this unit were asked for when the slot was empty, so that its rows of x are no
      // longer of the unit before. Of rows alone a parity could not tell: boxes arrive in any order.
      await(ring.weights + 8 * ring.stage, ring.parity);
      await_together(ring.rows + 8 * ring.stage, ring.parity);
#pragma unroll
      for (int i = 0; i < STEPS / 2; ++i) load_matrices(b[i], slot + b_place[i]);
      STAMP(done == 0 && unit == 0, 2);
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        if (t >= tiles) break;
        u32 a[STEPS][4];
#pragma unroll
        for (int i = 0; i < STEPS; ++i) load_matrices(a[i], slot + t * TILE_BYTES + a_place[i]);
#pragma unroll
        for (int i = 0; i < STEPS; ++i) multiply(d[t], a[i], b[i / 2][i % 2 * 2], b[i / 2][i % 2 * 2 + 1]);
      }
      release(ring.empty + 8 * ring.stage);
    }
    STAMP(done + TILES >= share.count, 3);
#pragma unroll
    for (int t = 0; t < TILES; ++t)
      if (warp != t)
#pragma unroll
        for (int i = 0; i < REGS; ++i) pool[((t * WARPS + warp) * REGS + i) * 32 + lane] = d[t][i];
    meet();
    if (finishes) {
      float sums[REGS];
#pragma unroll
      for (int i = 0; i < REGS; ++i) sums[i] = warp == 0 ? d[0][i] : d[1][i];
#pragma unroll
      for (int other = 1; other < WARPS; ++other) {
        int from = warp * WARPS + (warp + other) % WARPS;
#pragma unroll
        for (int i = 0; i < REGS; ++i) sums[i] += pool[(from * REGS + i) * 32 + lane];
      }
      if (p.in_words) finish_in_words(sums, tile, p, s.num_rows, factor, turn.first_tag + index);
      else if (p.kind == NORMED) finish_normed(sums, tile, p, s.num_rows, factor);
      else if (p.kind == GATED) finish_gated(sums, tile, p, s.num_rows, factor);
      else finish_adds(sums, before, tile, p, s.num_rows);
    }
    if (done + TILES < share.count) meet();  // before the pool is written again
  }
}
