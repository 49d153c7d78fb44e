// Attention of one new token per row over paged K and V (Dao et al., "Flash-Decoding", 2023).
#pragma once

#include "step.cuh"

constexpr int LANES = HEAD_DIM / 8;     // that share a key: 8 dimensions each
constexpr int KEYS = 32 / LANES;        // of a warp at a time
constexpr int DEEP = 4;                 // such times, whose loads are under way together

constexpr int STRIDE = DEEP * WARPS * KEYS;
constexpr int HEADS = GROUP * KV_HEADS;
constexpr int WIDTH = GROUP * HEAD_DIM; // of a KV head's outputs
constexpr int IN_WORD = 4;              // halves
constexpr int ROW_WORDS = (HEADS + 2 * KV_HEADS) * HEAD_DIM / IN_WORD;
constexpr int JOINED = 64;              // parts that are joined at a time
constexpr int TOGETHER = GROUP > 4 ? 2 : 4;  // keys whose scores are: what registers have room for

struct alignas(16) Joint { float best, total, sums[2]; };

struct AttentionScratch {
  union {
    float sums[WARPS][GROUP][HEAD_DIM];
    alignas(16) u64 heads[GROUP + 2][HEAD_DIM / IN_WORD];  // queries, key and value, as the product wrote them
    Joint joint[WIDTH / 2 + JOINED];           // [parts][outputs of this block, in twos]
  };
  float best[WARPS][GROUP], total[WARPS][GROUP];
};

struct Item { int row, slot, position, begin, end, first, num_parts, pad; };  // see key_shares.py
static_assert(sizeof(Item) == 32, "a row of `work`");

// A block's first item and where its first keys lie: the same in all layers, so looked up once, and not, one far load
// after another, when a layer's attention begins.
struct FirstItem {
  Item item;
  int places[STRIDE];  // rows of the pages

  __device__ __forceinline__ void find(const Step& s) {
    int at = blockIdx.x / KV_HEADS, thread = threadIdx.x;
    if (at >= s.num_items) return;
    Item found = ((const Item*)s.work)[at];
    if (thread == 0) item = found;
    if (found.row < 0 || found.begin == found.end) return;
    const int* table = s.page_table + (u64)found.slot * s.table_stride;
    for (int i = thread; i < STRIDE; i += THREADS) {
      int key = min(found.begin + i, found.end - 1);
      places[i] = table[key / PAGE_SIZE] * PAGE_SIZE + key % PAGE_SIZE;
    }
  }
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

  // So many keys together: their sums over lanes wait for each other's less. `seen` tells which of them are the item's.
  template <int COUNT, typename F>
  __device__ __forceinline__ void add(const float (&q)[GROUP][8], const Eight* keys, const Eight* values, F seen) {
    float scores[COUNT][GROUP];
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
      float k[8];
      widen_eight(keys[n], k);
#pragma unroll
      for (int g = 0; g < GROUP; ++g) {
        scores[n][g] = 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) scores[n][g] += q[g][i] * k[i];
      }
    }
#pragma unroll
    for (int step = 1; step < LANES; step *= 2)
#pragma unroll
      for (int n = 0; n < COUNT; ++n)
#pragma unroll
        for (int g = 0; g < GROUP; ++g) scores[n][g] += __shfl_xor_sync(0xffffffffu, scores[n][g], step);
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
      float top = best[g];
#pragma unroll
      for (int n = 0; n < COUNT; ++n) {
        if (!seen(n)) scores[n][g] = __int_as_float(0xff800000);  // -infinity
        top = fmaxf(top, scores[n][g]);
      }
      float shrink = power_of_two(best[g] - top);
      best[g] = top;
      total[g] *= shrink;
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[g][i] *= shrink;
#pragma unroll
      for (int n = 0; n < COUNT; ++n) {
        scores[n][g] = power_of_two(scores[n][g] - top);
        total[g] += scores[n][g];
      }
    }
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
      float v[8];
      widen_eight(values[n], v);
#pragma unroll
      for (int g = 0; g < GROUP; ++g)
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[g][i] += scores[n][g] * v[i];
    }
  }
};

struct Batch {  // keys and values of a warp, and of others in turn
  Eight keys[DEEP], values[DEEP];

  __device__ __forceinline__ void load_key(int i, const half_t* k_pages, const half_t* v_pages, int row, int head) {
    u64 place = ((u64)row * KV_HEADS + head) * HEAD_DIM + 8 * (threadIdx.x % LANES);
    keys[i] = load_eight(k_pages + place);
    values[i] = load_eight(v_pages + place);
  }

  __device__ __forceinline__ void load(const half_t* k_pages, const half_t* v_pages, const int* table, int base, int end,
                                       int head) {
#pragma unroll
    for (int i = 0; i < DEEP; ++i) {
      int at = min(base + i * WARPS * KEYS + (int)threadIdx.x % 32 / LANES, end - 1);
      load_key(i, k_pages, v_pages, table[at / PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE, head);
    }
  }

  __device__ __forceinline__ void load_first(const half_t* k_pages, const half_t* v_pages, const int* places, int head) {
#pragma unroll
    for (int i = 0; i < DEEP; ++i) load_key(i, k_pages, v_pages, places[i * WARPS * KEYS + threadIdx.x / LANES], head);
  }
};

// The item's queries, and of its last item the new key and value, when they are there, as halves in `heads`.
__device__ __forceinline__ void await_heads(const Word* row, int head, bool is_new, AttentionScratch& scratch, u64 tag) {
  constexpr int WORDS = HEAD_DIM / IN_WORD;
  for (int at = threadIdx.x; at < (GROUP + 2 * is_new) * WORDS; at += THREADS) {
    int which = at / WORDS;
    int from = which < GROUP ? head * GROUP + which : HEADS + (which - GROUP) * KV_HEADS + head;
    Word seen;
    do seen = look(row + from * WORDS + at % WORDS);
    while (seen.tag != tag);
    scratch.heads[which][at % WORDS] = seen.data;
  }
  meet();
}

// Where an item's part of one KV head lies, until all parts are joined.
struct Part {
  Word *sums, *stats;
  __device__ Part(const Step& s, int item_index, int head) {
    u64 cell = ((u64)item_index * KV_HEADS + head) * GROUP;
    sums = s.item_sums + cell * (HEAD_DIM / 2);
    stats = s.item_stats + cell;
  }
};

// One item's keys for one KV head. All that was there before the phase is loaded first.
__device__ __forceinline__ void attend_item(const Step& s, const Phase& p, const FirstItem& first_item, int item_index,
                                            int head, bool is_first, AttentionScratch& scratch, const Turn& turn,
                                            int index) {
  int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, part = lane % LANES, which = lane / LANES;
  const Item item = is_first ? first_item.item : ((const Item*)s.work)[item_index];
  int row = item.row, end = item.end, base = item.begin + warp * KEYS;
  bool is_new = item_index - item.first == item.num_parts - 1;  // has the new token
  const int* table = s.page_table + (u64)item.slot * s.table_stride;
  half_t *k_pages = p.k_pages, *v_pages = p.v_pages;
  Batch batch;
  if (is_first) {
    if (base < end) batch.load_first(k_pages, v_pages, first_item.places, head);
  } else if (base < end) {
    batch.load(k_pages, v_pages, table, base, end, head);
  }
  u64 angle = (u64)item.position * (HEAD_DIM / 2) + 8 * (part % (LANES / 2));
  Eight cos = load_eight(s.cos + angle), sin = load_eight(s.sin + angle);
  long long write_index = s.write_index[row];

  if (!is_first) meet();  // the scratch may still be read for the item before
  await_heads(p.x + (u64)row * ROW_WORDS, head, is_new, scratch, turn.first_tag + index - 1);
  STAMP(is_first, 0);
  auto head_of = [&](int i) { return ((const Eight*)scratch.heads[i])[part]; };
  Online online;
  float q[GROUP][8];
  Eight raw_q[GROUP];
#pragma unroll
  for (int g = 0; g < GROUP; ++g) raw_q[g] = head_of(g);
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
  if (is_new && warp == WARPS - 1) {
    float k[8];
    Eight key = head_of(GROUP), value = head_of(GROUP + 1);
    widen_eight(key, k);
    rotate(k, p.k_norm, cos, sin, part, s.eps);
#pragma unroll
    for (int i = 0; i < 4; ++i) key.words[i] = (u32)narrow(k[2 * i]) | (u32)narrow(k[2 * i + 1]) << 16;
    u64 place = ((u64)write_index * KV_HEADS + head) * HEAD_DIM + 8 * part;
    if (which == 0) {
      store_eight(k_pages + place, key);
      store_eight(v_pages + place, value);
    }
    online.add<1>(q, &key, &value, [&](int) { return which == 0; });
  }
#pragma unroll 1
  for (; base < end; base += STRIDE) {
    Batch next = batch;
    if (base + STRIDE < end) next.load(k_pages, v_pages, table, base + STRIDE, end, head);
#pragma unroll
    for (int i = 0; i < DEEP; i += TOGETHER)
      online.add<TOGETHER>(q, batch.keys + i, batch.values + i,
                           [&](int n) { return base + (i + n) * WARPS * KEYS + which < end; });
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
  meet();  // the scratch may still be read: the queries, or for the item before
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
  Part mine(s, item_index, head);
  for (int at = thread; at < WIDTH / 2; at += THREADS) {
    int g = at / (HEAD_DIM / 2), dim = 2 * at % HEAD_DIM;
    float top = -1e30f, total = 0.f, sum[2] = {0.f, 0.f};
#pragma unroll
    for (int w = 0; w < WARPS; ++w) top = fmaxf(top, scratch.best[w][g]);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      float factor = power_of_two(scratch.best[w][g] - top);
      total += factor * scratch.total[w][g];
      sum[0] += factor * scratch.sums[w][g][dim];
      sum[1] += factor * scratch.sums[w][g][dim + 1];
    }
    if (item.num_parts == 1) {
      *(u32*)(out + 2 * at) = (u32)narrow(sum[0] / total) | (u32)narrow(sum[1] / total) << 16;
    } else {
      publish(mine.sums + at, sum[0], sum[1], turn.first_tag + index);
      if (dim == 0) publish(mine.stats + g, top, total, turn.first_tag + index);
    }
  }
  STAMP(true, 2);
}

// Each of a row's parts joins all of them for a share of the head's outputs, when they are there: a store and a load
// of all blocks at once, and no block waits for another's sums but for these.
//   Nobody waits forever: a block publishes the parts of all its items before it waits for others', and all blocks run.
//   Nobody takes an older part for this one: its tag is of this launch and phase, and never comes again.
//   Nobody overwrites what is still unread: these cells are written next in the next layer's attention, which begins
// after phases that begin when all blocks have ended this one; `tell_ended` comes after the joins. The same holds for
// the words of queries, keys and values: the next product that writes them begins later still.
__device__ __forceinline__ void join_item(const Step& s, const Phase& p, const Item& item, int item_index, int head,
                                          AttentionScratch& scratch, u64 tag) {
  int thread = threadIdx.x, which = item_index - item.first, count = item.num_parts;
  int begin = which * (WIDTH / 2) / count, width = (which + 1) * (WIDTH / 2) / count - begin;
  float top = -1e30f, total = 0.f, sum[2] = {0.f, 0.f};
#pragma unroll 1
  for (int done = 0; done < count; done += JOINED) {
    int parts = min(JOINED, count - done);
    meet();  // the scratch may still be read
#pragma unroll 1
    for (int i = thread; i < parts * width; i += THREADS) {
      Part theirs(s, item.first + done + i / width, head);
      int at = begin + i % width;
      Word stats, sums;
      do stats = look(theirs.stats + at / (HEAD_DIM / 2)), sums = look(theirs.sums + at);
      while (stats.tag != tag || sums.tag != tag);
      scratch.joint[i] = {first_of(stats), second_of(stats), {first_of(sums), second_of(sums)}};
    }
    meet();
    if (thread < width)
#pragma unroll 4
      for (int i = 0; i < parts; ++i) {
        Joint theirs = scratch.joint[i * width + thread];
        float higher = fmaxf(top, theirs.best), shrink = power_of_two(top - higher);
        float factor = power_of_two(theirs.best - higher);
        top = higher;
        total = total * shrink + factor * theirs.total;
        sum[0] = sum[0] * shrink + factor * theirs.sums[0];
        sum[1] = sum[1] * shrink + factor * theirs.sums[1];
      }
  }
  half_t* out = (half_t*)p.out + ((u64)item.row * HEADS + head * GROUP) * HEAD_DIM + 2 * begin;
  if (thread < width)
    *(u32*)(out + 2 * thread) = (u32)narrow(sum[0] / total) | (u32)narrow(sum[1] / total) << 16;
}
static_assert(WIDTH / 4 <= THREADS, "a thread for each two outputs of a share: a row has two parts, or more");

__device__ __forceinline__ void attend_phase(const Step& s, const Phase& p, const FirstItem& first_item,
                                             AttentionScratch& scratch, const Turn& turn, int index) {
  STAMP(true, 0);  // later if it has an item
  auto item_of = [&](int at) {
    return at == blockIdx.x ? first_item.item : ((const Item*)s.work)[at / KV_HEADS];
  };
  int end = s.num_items * KV_HEADS;
#pragma unroll 1
  for (int at = blockIdx.x; at < end; at += gridDim.x) {
    if (item_of(at).row < 0) break;  // items are dense
    attend_item(s, p, first_item, at / KV_HEADS, at % KV_HEADS, at == blockIdx.x, scratch, turn, index);
  }
#pragma unroll 1
  for (int at = blockIdx.x; at < end; at += gridDim.x) {
    Item item = item_of(at);
    if (item.row < 0) break;
    if (item.num_parts > 1) join_item(s, p, item, at / KV_HEADS, at % KV_HEADS, scratch, turn.first_tag + index);
  }
}
