// Attention of one new token per row over paged K and V (Dao et al., "Flash-Decoding", 2023).
#pragma once

#include "step.cuh"

constexpr int LANES = HEAD_DIM / 8;     // that share a key: 8 dimensions each
constexpr int KEYS = 32 / LANES;        // of a warp at a time
constexpr int DEEP = 4;                 // such times, whose loads are under way together

struct AttentionScratch {
  float sums[WARPS][GROUP][HEAD_DIM];
  float best[WARPS][GROUP], total[WARPS][GROUP];
};

// Dimensions 8 * part .. of a head, normed and rotated, rounded as it would be stored.
__device__ __forceinline__ void rotate(float (&v)[8], const half_t* norm, const Eight& cos, const Eight& sin, int part,
                                       float eps) {
#if QK_NORM
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < 8; ++i) squares += v[i] * v[i];
#pragma unroll
  for (int step = 1; step < LANES; step *= 2) squares += __shfl_xor_sync(0xffffffffu, squares, step);
  float factor = rsqrtf(squares / HEAD_DIM + eps);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] *= factor * widen(norm[8 * part + i]);
#endif
  bool high = part >= LANES / 2;
  float c[8], n[8];
  widen_eight(cos, c);
  widen_eight(sin, n);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float other = __shfl_xor_sync(0xffffffffu, v[i], LANES / 2);
    v[i] = widen(narrow(high ? v[i] * c[i] + other * n[i] : v[i] * c[i] - other * n[i]));
  }
}

struct Online {  // softmax over the keys that a group of lanes has seen
  float best[GROUP], total[GROUP], sums[GROUP][8];

  __device__ __forceinline__ void add(const float (&q)[GROUP][8], const Eight& key, const Eight& value, bool seen) {
    float k[8], v[8];
    widen_eight(key, k);
    widen_eight(value, v);
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
      float score = 0.f;
#pragma unroll
      for (int i = 0; i < 8; ++i) score += q[g][i] * k[i];
#pragma unroll
      for (int step = 1; step < LANES; step *= 2) score += __shfl_xor_sync(0xffffffffu, score, step);
      if (!seen) continue;
      float top = fmaxf(best[g], score), shrink = power_of_two(best[g] - top), weight = power_of_two(score - top);
      best[g] = top;
      total[g] = total[g] * shrink + weight;
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[g][i] = sums[g][i] * shrink + weight * v[i];
    }
  }
};

struct Batch {  // keys and values of a warp, and of others in turn
  Eight keys[DEEP], values[DEEP];

  __device__ __forceinline__ void load(const half_t* k_pages, const half_t* v_pages, const int* table, int base, int end,
                                       int head) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < DEEP; ++i) {
      int at = min(base + i * WARPS * KEYS + lane / LANES, end - 1);
      u64 place = (((u64)table[at / PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE) * KV_HEADS + head) * HEAD_DIM +
                  8 * (lane % LANES);
      keys[i] = load_eight(k_pages + place);
      values[i] = load_eight(v_pages + place);
    }
  }
};

// One item's keys for one KV head. `begin_phase` is called when all is loaded that was there before the phase.
template <typename F>
__device__ __forceinline__ void attend_item(const Step& s, const Phase& p, int item_index, int head,
                                            AttentionScratch& scratch, int* is_last, int index, F begin_phase) {
  int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, part = lane % LANES, which = lane / LANES;
  const int* item = s.work + item_index * 8;
  int row = item[0], slot = item[1], position = item[2], begin = item[3], end = item[4], first = item[5],
      num_parts = item[6];
  constexpr int HEADS = GROUP * KV_HEADS, STRIDE = DEEP * WARPS * KEYS;
  const int* table = s.page_table + (u64)slot * s.table_stride;
  half_t *k_pages = p.k_pages, *v_pages = p.v_pages;
  int base = begin + warp * KEYS;
  Batch batch;
  if (base < end) batch.load(k_pages, v_pages, table, base, end, head);
  u64 angle = (u64)position * (HEAD_DIM / 2) + 8 * (part % (LANES / 2));
  Eight cos = load_eight(s.cos + angle), sin = load_eight(s.sin + angle);
  begin_phase();

  const half_t* source = p.x + (u64)row * ((HEADS + 2 * KV_HEADS) * HEAD_DIM) + 8 * part;
  Online online;
  float q[GROUP][8];
  Eight raw_q[GROUP];
#pragma unroll
  for (int g = 0; g < GROUP; ++g) raw_q[g] = load_eight(source + (head * GROUP + g) * HEAD_DIM);
#pragma unroll
  for (int g = 0; g < GROUP; ++g) {
    widen_eight(raw_q[g], q[g]);
    rotate(q[g], p.q_norm, cos, sin, part, s.eps);
    online.best[g] = -1e30f;
    online.total[g] = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      q[g][i] *= s.scale_log2;
      online.sums[g][i] = 0.f;
    }
  }
  if (item_index - first == num_parts - 1 && warp == WARPS - 1) {  // the new token
    float k[8];
    Eight key = load_eight(source + (HEADS + head) * HEAD_DIM);
    Eight value = load_eight(source + (HEADS + KV_HEADS + head) * HEAD_DIM);
    widen_eight(key, k);
    rotate(k, p.k_norm, cos, sin, part, s.eps);
#pragma unroll
    for (int i = 0; i < 4; ++i) key.words[i] = (u32)narrow(k[2 * i]) | (u32)narrow(k[2 * i + 1]) << 16;
    u64 place = ((u64)s.write_index[row] * KV_HEADS + head) * HEAD_DIM + 8 * part;
    if (which == 0) {
      store_eight(k_pages + place, key);
      store_eight(v_pages + place, value);
    }
    online.add(q, key, value, which == 0);
  }
#pragma unroll 1
  for (; base < end; base += STRIDE) {
    Batch next = batch;
    if (base + STRIDE < end) next.load(k_pages, v_pages, table, base + STRIDE, end, head);
#pragma unroll
    for (int i = 0; i < DEEP; ++i)
      online.add(q, batch.keys[i], batch.values[i], base + i * WARPS * KEYS + which < end);
    batch = next;
  }

  STAMP(true, 1);
  // The lanes' keys, then the warps'.
#pragma unroll
  for (int step = LANES; step < 32; step *= 2)
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
      float theirs = __shfl_xor_sync(0xffffffffu, online.best[g], step), top = fmaxf(online.best[g], theirs);
      float shrink = power_of_two(online.best[g] - top);
      online.best[g] = top;
      online.total[g] *= shrink;
      online.total[g] += __shfl_xor_sync(0xffffffffu, online.total[g], step);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        online.sums[g][i] *= shrink;
        online.sums[g][i] += __shfl_xor_sync(0xffffffffu, online.sums[g][i], step);
      }
    }
  meet();  // the scratch may still be read for the item before
  if (which == 0)
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
#pragma unroll
      for (int i = 0; i < 8; ++i) scratch.sums[warp][g][8 * part + i] = online.sums[g][i];
      if (part == 0) {
        scratch.best[warp][g] = online.best[g];
        scratch.total[warp][g] = online.total[g];
      }
    }
  meet();
  half_t* out = (half_t*)p.out + ((u64)row * HEADS + head * GROUP) * HEAD_DIM;
  u64 cell = ((u64)item_index * KV_HEADS + head) * GROUP;
  for (int at = thread; at < GROUP * HEAD_DIM; at += THREADS) {
    int g = at / HEAD_DIM, dim = at % HEAD_DIM;
    float top = -1e30f, total = 0.f, sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) top = fmaxf(top, scratch.best[w][g]);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      float factor = power_of_two(scratch.best[w][g] - top);
      total += factor * scratch.total[w][g];
      sum += factor * scratch.sums[w][g][dim];
    }
    if (num_parts == 1) {
      out[at] = narrow(sum / total);
    } else {
      s.item_sums[cell * HEAD_DIM + at] = sum;
      if (dim == 0) {
        s.item_stats[(cell + g) * 2] = top;
        s.item_stats[(cell + g) * 2 + 1] = total;
      }
    }
  }
  STAMP(true, 2);
  if (num_parts == 1 || !is_last_of(num_parts, s.item_arrivals + row * KV_HEADS + head, is_last)) return;
  STAMP(true, 3);
  for (int at = 2 * thread; at < GROUP * HEAD_DIM; at += 2 * THREADS) {
    int g = at / HEAD_DIM;
    float top = -1e30f, total = 0.f, sum[2] = {0.f, 0.f};
    for (int from = 0; from < num_parts; from += 16) {
      float stats[16][2], sums[16][2];
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        u64 theirs = ((u64)(first + min(from + i, num_parts - 1)) * KV_HEADS + head) * GROUP;
        load_two(s.item_stats + (theirs + g) * 2, stats[i]);
        load_two(s.item_sums + theirs * HEAD_DIM + at, sums[i]);
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        if (from + i >= num_parts) break;
        float higher = fmaxf(top, stats[i][0]), shrink = power_of_two(top - higher);
        float factor = power_of_two(stats[i][0] - higher);
        top = higher;
        total = total * shrink + factor * stats[i][1];
        sum[0] = sum[0] * shrink + factor * sums[i][0];
        sum[1] = sum[1] * shrink + factor * sums[i][1];
      }
    }
    *(u32*)(out + at) = (u32)narrow(sum[0] / total) | (u32)narrow(sum[1] / total) << 16;
  }
}

template <typename F>
__device__ __forceinline__ void attend_phase(const Step& s, const Phase& p, AttentionScratch& scratch, int* is_last,
                                             int index, F begin_phase) {
  bool begun = false;
  auto begin_once = [&] {
    if (!begun) begin_phase();
    begun = true;
  };
#pragma unroll 1
  for (int at = blockIdx.x; at < s.num_items * KV_HEADS; at += gridDim.x) {
    if (s.work[at / KV_HEADS * 8] < 0) break;  // items are dense
    attend_item(s, p, at / KV_HEADS, at % KV_HEADS, scratch, is_last, index, begin_once);
  }
  begin_once();
}
