// A whole decode step of few rows in one launch, at the speed of memory, on Hopper.
//
//   phase     a matrix product out[m][n] = sum_k x[m][k] * w[n][k], or attention; the next begins when all blocks
//             have ended it, but attention when its queries, keys and values are there
//   block     one per multiprocessor; has whole rows of the weight, 16 at least, so that nobody waits for others' sums
//   pass      up to 2 tiles of 16 rows, through all of k
//   unit      of a pass: 256 inputs of its rows (8 KB a tile), with the same inputs of x
//   ring      STAGES units in shared memory
//
// One warp brings weights into the ring by TMA, and runs ahead of everybody: weights depend on nothing, so
// memory stays busy while a phase ends and blocks wait for each other. A second warp brings x when the phase before
// has ended; eight multiply (weights on the left; two take every fourth unit, half of its inputs each), or
// attend. Sums are added in a fixed order: the same step gives the same bits.
//
// Compiled by NVRTC (program.py) with
//   HALF 0: bfloat16, 1: float16;  MAX_ROWS of x, 8 at most: the matrix units' narrow side;  STAGES;
//   HEAD_DIM, GROUP (query heads of a KV head), KV_HEADS, PAGE_SIZE, QK_NORM;  TRACE, if defined: times (`trace`)
//
// Layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16" and "Swizzling Modes" of tensor copies (128 bytes).

#include "attention.cuh"
#include "products.cuh"

__device__ __forceinline__ void bring_weights(const Step& s, Ring ring) {
  u64 policy = streaming_policy();
  int brought = 0;
  const TensorMap *map = s.w_maps, *last = s.w_maps + s.phases[s.num_phases - 1].w_map;  // in order of phases
  know_map(map);
#pragma unroll 1
  for (int index = 0; index < s.num_phases; ++index) {
    const Phase p = s.phases[index];
    if (p.kind == ATTENDS) continue;
    bool gated = p.kind == GATED;
    bool calm = CALM_UNITS + ASKED_UNITS > 0 && index > 0 && s.phases[index - 1].kind == ATTENDS;
    int units = (p.k + BK - 1) / BK;
    Share share(p);
#pragma unroll 1
    for (int done = 0; done < share.count; done += TILES) {
      int tile = share.tile + done, tiles = min(TILES, share.count - done);
#pragma unroll 1
      for (int count = 0, unit = first_unit(units); count < units; ++count, unit = unit + 1 == units ? 0 : unit + 1) {
        if (ASKED_UNITS > 0 && calm && done == 0 && count == STAGES)  // the ring is full, and others attend
#pragma unroll 1
          for (int i = 0; i < min(ASKED_UNITS, units - count); ++i) {
            int later = unit + i < units ? unit + i : unit + i - units;
            for (int t = 0; t < tiles; ++t) ask_weight(map, later, (tile + t) * TILE);
          }
        await(ring.empty + 8 * ring.stage, ring.parity ^ 1);
        // What waits in the memory's queues makes everybody else wait: no more than keeps them busy.
        int window = calm && done == 0 && count < CALM_UNITS ? CALM_WINDOW : WINDOW;
        if (brought >= window) {
          int before = brought - window;
          await(ring.weights + 8 * (before % STAGES), before / STAGES & 1);
        }
        ++brought;
        u32 to = ring.slots + ring.stage * SLOT, barrier = ring.weights + 8 * ring.stage;
        arrive_expecting(barrier, tiles * TILE_BYTES);
#pragma unroll 1
        for (int i = 0; i < tiles; ++i) {
          if (gated) bring_gated(to + i * TILE_BYTES, map, unit, tile + i, barrier, policy);
          else bring_weight(to + i * TILE_BYTES, map, unit, (tile + i) * TILE, barrier, policy);
        }
        ring.advance();
        if (done == 0 && count == 0 && map < last) know_map(map + 1);  // it is far away; there is time now
      }
    }
    if (share.count == 0 && map < last) know_map(map + 1);
    ++map;
  }
}

__device__ __forceinline__ void bring_rows(const Step& s, const Turn& turn, Ring ring) {
#pragma unroll 1
  for (int index = 0; index < s.num_phases; ++index) {
    const Phase p = s.phases[index];
    if (p.kind == ATTENDS) continue;
    const TensorMap* map = s.x_maps + p.x_map;
    int units = (p.k + BK - 1) / BK, bytes = s.num_rows * BK * 2;
    Share share(p);
    if (share.count == 0) continue;
    know_map(map);
    if (index > 0) {
      await_all(s.ended + index - 1, turn);
      asm volatile("fence.proxy.async.global;" ::: "memory");
    }
#pragma unroll 1
    for (int done = 0; done < share.count; done += TILES)
#pragma unroll 1
      for (int count = 0, unit = first_unit(units); count < units; ++count, unit = unit + 1 == units ? 0 : unit + 1) {
        await(ring.empty + 8 * ring.stage, ring.parity ^ 1);
        u32 barrier = ring.rows + 8 * ring.stage;
        arrive_expecting(barrier, bytes);
        bring_x(ring.slots + ring.stage * SLOT + A_BYTES, map, unit, barrier);
        ring.advance();
      }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS + 64, 1) decode_step(const __grid_constant__ Step s) {
  extern __shared__ char raw[];
  __shared__ float factor[8];  // of rows, also of those that the fragments have beyond MAX_ROWS
  __shared__ union { float pool[TILES * WARPS * REGS * 32]; AttentionScratch attention; } scratch;
  __shared__ u64 barriers[3 * STAGES];
  __shared__ FirstItem first_item;
  __shared__ Phase phase[2];  // this one and the next: what is far away is asked for a phase ahead
  int thread = threadIdx.x;
  u32 first = shared_address(barriers);
  Ring ring{(shared_address(raw) + 1023) & ~1023u, first, first + 8 * STAGES, first + 16 * STAGES, 0, 0};
  if (thread == 0) {
    for (int i = 0; i < STAGES; ++i) {
      make_barrier(ring.weights + 8 * i, 1);
      make_barrier(ring.rows + 8 * i, 1);
      make_barrier(ring.empty + 8 * i, SHARING);
    }
    publish_barriers();
  }
  __syncthreads();
  if (thread >= THREADS) {
    if (thread == THREADS) bring_weights(s, ring);
    if (thread == THREADS + 32) bring_rows(s, Turn(s), ring);
    return;
  }
  Turn turn(s);
  auto fetch_phase = [&](int index) {
    constexpr int WORDS = sizeof(Phase) / 8;
    if (thread < WORDS && index < s.num_phases)
      ((u64*)&phase[index % 2])[thread] = ((const u64*)(s.phases + index))[thread];
  };
  fetch_phase(0);
  first_item.find(s);
  meet();
#pragma unroll 1
  for (int index = 0; index < s.num_phases; ++index) {
    fetch_phase(index + 1);
    const Phase& p = phase[index % 2];
    if (p.kind == ATTENDS) {
      attend_phase(s, p, first_item, scratch.attention, turn, index);
    } else {
      if (index > 0) {
        if (thread == 0) await_all(s.ended + index - 1, turn);
        meet();
      }
      STAMP(true, 0);
      multiply_phase(s, p, ring, factor, scratch.pool, turn, index);
    }
    STAMP(true, 4);
    if (p.in_words) meet();  // of this block only: its scratch has other uses now
    else if (index + 1 < s.num_phases) tell_ended(s, index);
    STAMP(true, 5);
  }
  meet();
  if (thread == 0) {
    __threadfence();
    if (atomicAdd(s.ended + s.num_phases, 1) + 1 == turn.all_ended) ++*s.launch;  // all have read it
  }
}
