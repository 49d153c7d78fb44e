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

#include "shares.cuh"

constexpr int HALVES = HEAD_DIM / 64;            // of a head's dimensions: rows of 128 bytes, what the swizzle spans
constexpr int STEPS = HEAD_DIM / 16;             // of the matrix units, through a head's dimensions
constexpr int HEAD_BYTES = HALVES * TILE * 128;  // of a tile
constexpr int TILE_BYTES = KV_HEADS * HEAD_BYTES;
constexpr int SLOT = 2 * TILE_BYTES;             // keys, then values
constexpr int HEADS = KV_HEADS * GROUP;
constexpr int QKV_WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_DIM;
constexpr int THREADS = 32 * (KV_HEADS + 1);
constexpr float NEVER = -1e30f;                  // less than any score, and a number
static_assert(GROUP <= 8 && HEAD_DIM % 64 == 0, "as page_plan.py takes them");

// As `page_attention.py` packs it.
struct Attention {
  TensorMap k, v;
  Rows rows;
  const half_t* qkv;       // [num_rows][QKV_WIDTH]
  const half_t* cos;       // [positions][HEAD_DIM / 2]
  const half_t* sin;
  const half_t* q_norm;
  const half_t* k_norm;
  const long long* write_index;
  half_t* k_pages;
  half_t* v_pages;
  half_t* out;             // [num_rows][HEADS * HEAD_DIM]
  float4* parts;           // [2 * blocks][KV_HEADS][STEPS][32]
  float4* stats;           // [2 * blocks][KV_HEADS][4]: best and total of two queries each
  u32* arrivals;           // [num_rows][KV_HEADS], zero between launches
  float eps, scale_log2;
  int layer;
};
static_assert(sizeof(Attention) == 448, "as page_attention.py packs it");

#ifdef TRACE  // nanoseconds, by layer, stamp and block; named in benchmarks/trace_product_chain.py
constexpr int STAMPS = 7, MAX_BLOCKS = 160, MAX_LAYERS = 96;
__device__ long long trace[MAX_LAYERS][STAMPS][MAX_BLOCKS];
__device__ __forceinline__ void stamp(const Attention& a, int what) {
  long long now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  if (blockIdx.x < MAX_BLOCKS) trace[a.layer][what][blockIdx.x] = now;
}
#define STAMP(when, what) do { if (when) stamp(a, what); } while (0)
#else
#define STAMP(when, what)
#endif

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

// Two neighbours as one word.
__device__ __forceinline__ u32 narrow_two(float a, float b) { return (u32)narrow(a) | (u32)narrow(b) << 16; }
__device__ __forceinline__ float low_of(u32 two) { return widen((half_t)(two & 0xffff)); }
__device__ __forceinline__ float high_of(u32 two) { return widen((half_t)(two >> 16)); }

// Rotates dimensions (x) and those half a head further (y), two neighbours of each.
struct Turned { u32 x, y; };
__device__ __forceinline__ Turned rotate(const float (&x)[2], const float (&y)[2], u32 cos, u32 sin) {
  float c[2] = {low_of(cos), high_of(cos)}, s[2] = {low_of(sin), high_of(sin)};
  return {narrow_two(x[0] * c[0] - y[0] * s[0], x[1] * c[1] - y[1] * s[1]),
          narrow_two(y[0] * c[0] + x[0] * s[0], y[1] * c[1] + x[1] * s[1])};
}

// The queries of a row's head, on the matrix units' right side: a thread has of one query (`lane / 4`) two neighbours of
// each 8 dimensions.
__device__ __forceinline__ void load_queries(const Attention& a, int row, int head, int position, u32 (&q)[STEPS][2]) {
  int lane = threadIdx.x % 32, query = lane / 4, at = lane % 4 * 2;
  const half_t* from = a.qkv + (u64)row * QKV_WIDTH + (head * GROUP + min(query, GROUP - 1)) * HEAD_DIM + at;
  u64 angle = (u64)position * (HEAD_DIM / 2) + at;
  u32 cos[STEPS / 2][2], sin[STEPS / 2][2];
#pragma unroll
  for (int i = 0; i < STEPS; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j) q[i][j] = load_two(from + 16 * i + 8 * j);
#pragma unroll
  for (int i = 0; i < STEPS / 2; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      cos[i][j] = *(const u32*)(a.cos + angle + 16 * i + 8 * j);
      sin[i][j] = *(const u32*)(a.sin + angle + 16 * i + 8 * j);
    }
  float factor = 1.f;
  if (QK_NORM) {
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < STEPS; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) squares += low_of(q[i][j]) * low_of(q[i][j]) + high_of(q[i][j]) * high_of(q[i][j]);
    squares += __shfl_xor_sync(~0u, squares, 1);
    squares += __shfl_xor_sync(~0u, squares, 2);
    factor = rsqrtf(squares / HEAD_DIM + a.eps);
  }
  auto normed = [&](u32 two, int dim, float (&out)[2]) {
    u32 gain = QK_NORM ? *(const u32*)(a.q_norm + at + dim) : 0;
    out[0] = low_of(two) * (QK_NORM ? factor * low_of(gain) : 1.f);
    out[1] = high_of(two) * (QK_NORM ? factor * high_of(gain) : 1.f);
  };
#pragma unroll
  for (int i = 0; i < STEPS / 2; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float x[2], y[2];
      normed(q[i][j], 16 * i + 8 * j, x);
      normed(q[i + STEPS / 2][j], 16 * i + 8 * j + HEAD_DIM / 2, y);
      Turned turned = rotate(x, y, cos[i][j], sin[i][j]);
      q[i][j] = query < GROUP ? turned.x : 0;
      q[i + STEPS / 2][j] = query < GROUP ? turned.y : 0;
    }
}

// Where a tile has dimension `dim` of a token, from the head's first byte on.
__device__ __forceinline__ u32 place_of(int token, int dim) {
  return dim / 64 * (TILE * 128) + token * 128 + ((dim % 64 / 8 ^ token % 8) * 16) + dim % 8 * 2;
}

__device__ __forceinline__ void store_shared(u32 to, u32 word) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
}

// The new token's key and value of a head, into their page and into the tile in `keys` and `values`; zeros behind them.
__device__ __forceinline__ void put_new(const Attention& a, int row, int head, int position, u32 keys, u32 values) {
  int lane = threadIdx.x % 32, token = position % TILE;
  const half_t* k = a.qkv + (u64)row * QKV_WIDTH + (HEADS + head) * HEAD_DIM;
  const half_t* v = k + KV_HEADS * HEAD_DIM;
  u64 place = (u64)a.write_index[row] * (KV_HEADS * HEAD_DIM) + head * HEAD_DIM;
  constexpr int PAIRS = (HEAD_DIM / 2 + 63) / 64;  // of a lane
  u32 low[PAIRS], high[PAIRS];
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) {
    int dim = 64 * i + 2 * lane;
    bool has = dim < HEAD_DIM / 2;
    low[i] = has ? load_two(k + dim) : 0;
    high[i] = has ? load_two(k + HEAD_DIM / 2 + dim) : 0;
    squares += low_of(low[i]) * low_of(low[i]) + high_of(low[i]) * high_of(low[i]);
    squares += low_of(high[i]) * low_of(high[i]) + high_of(high[i]) * high_of(high[i]);
  }
  float factor = 1.f;
  if (QK_NORM) {
#pragma unroll
    for (int apart = 1; apart < 32; apart *= 2) squares += __shfl_xor_sync(~0u, squares, apart);
    factor = rsqrtf(squares / HEAD_DIM + a.eps);
  }
  auto normed = [&](u32 two, int dim, float (&out)[2]) {
    u32 gain = QK_NORM ? *(const u32*)(a.k_norm + dim) : 0;
    out[0] = low_of(two) * (QK_NORM ? factor * low_of(gain) : 1.f);
    out[1] = high_of(two) * (QK_NORM ? factor * high_of(gain) : 1.f);
  };
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) {
    int dim = 64 * i + 2 * lane;
    if (dim >= HEAD_DIM / 2) break;
    u64 angle = (u64)position * (HEAD_DIM / 2) + dim;
    float x[2], y[2];
    normed(low[i], dim, x);
    normed(high[i], dim + HEAD_DIM / 2, y);
    Turned turned = rotate(x, y, *(const u32*)(a.cos + angle), *(const u32*)(a.sin + angle));
    *(u32*)(a.k_pages + place + dim) = turned.x;
    *(u32*)(a.k_pages + place + dim + HEAD_DIM / 2) = turned.y;
    store_shared(keys + place_of(token, dim), turned.x);
    store_shared(keys + place_of(token, dim + HEAD_DIM / 2), turned.y);
  }
#pragma unroll
  for (int half = 0; half < HALVES; ++half) {
    int dim = 64 * half + 2 * lane;
    u32 two = load_two(v + dim);
    *(u32*)(a.v_pages + place + dim) = two;
    store_shared(values + place_of(token, dim), two);
    for (int behind = token + 1; behind < TILE; ++behind) store_shared(values + half * TILE * 128 + behind * 128 + lane * 4, 0);
  }
  __syncwarp();
}

__device__ __forceinline__ u32 transpose(u32 two) {
  u32 out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(two));
  return out;
}

__device__ __forceinline__ void load_transposed(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// Of two queries (`lane % 4 * 2` and the next): the highest score, the sum of weights relative to that (of this thread's
// keys alone, until `complete`), and the weighted sums of values: of each 16 dimensions `lane / 4` and that plus 8.
struct Sums {
  float best[2], total[2], of[STEPS][4];

  __device__ void clear() {
    best[0] = best[1] = NEVER;
    total[0] = total[1] = 0.f;
#pragma unroll
    for (int i = 0; i < STEPS; ++i) of[i][0] = of[i][1] = of[i][2] = of[i][3] = 0.f;
  }

  __device__ void shrink(const float (&factor)[2]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) total[j] *= factor[j];
#pragma unroll
    for (int i = 0; i < STEPS; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) of[i][j] *= factor[j % 2];
  }

  // 16 keys, of which the first `seen` count.
  __device__ void add(const u32 (&q)[STEPS][2], u32 keys, u32 values, int seen, float scale_log2) {
    int lane = threadIdx.x % 32, swizzle = lane % 8;
    float scores[2][4] = {};  // of even and odd steps: two chains of products
    u32 from = keys + (lane % 8 + lane / 8 % 2 * 8) * 128;
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      u32 left[4];
      load_matrices(left, from + i / 4 * (TILE * 128) + ((i % 4 * 2 + lane / 16) ^ swizzle) * 16);
      multiply(scores[i % 2], left, q[i][0], q[i][1]);
    }
    float s[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      s[j] = (scores[0][j] + scores[1][j]) * scale_log2;
      if (lane / 4 + j / 2 * 8 >= seen) s[j] = NEVER;
    }
    float high[2] = {fmaxf(s[0], s[2]), fmaxf(s[1], s[3])};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int apart = 4; apart < 32; apart *= 2) high[j] = fmaxf(high[j], __shfl_xor_sync(~0u, high[j], apart));
      high[j] = fmaxf(high[j], best[j]);
    }
    if (__any_sync(~0u, high[0] > best[0] || high[1] > best[1])) {
      float factor[2] = {power_of_two(best[0] - high[0]), power_of_two(best[1] - high[1])};
      shrink(factor);
      best[0] = high[0];
      best[1] = high[1];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) s[j] = lane / 4 + j / 2 * 8 < seen ? power_of_two(s[j] - best[j % 2]) : 0.f;
    total[0] += s[0] + s[2];
    total[1] += s[1] + s[3];
    u32 first = transpose(narrow_two(s[0], s[1])), second = transpose(narrow_two(s[2], s[3]));
    from = values + (lane % 8 + lane / 16 * 8) * 128;
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      u32 left[4];
      load_transposed(left, from + i / 4 * (TILE * 128) + ((i % 4 * 2 + lane / 8 % 2) ^ swizzle) * 16);
      multiply(of[i], left, first, second);
    }
  }

  __device__ void complete() {
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int apart = 4; apart < 32; apart *= 2) total[j] += __shfl_xor_sync(~0u, total[j], apart);
  }

  __device__ void store(half_t* out) const {  // the queries of one KV head
    int lane = threadIdx.x % 32, query = lane % 4 * 2;
    bool odd = lane / 4 % 2;
    float per[2] = {1.f / total[0], 1.f / total[1]};
#pragma unroll
    for (int i = 0; i < STEPS; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {  // who has the next dimension gives it for this query, and gets the next query's
        float mine[2] = {of[i][2 * j] * per[0], of[i][2 * j + 1] * per[1]};
        float theirs = __shfl_xor_sync(~0u, odd ? mine[0] : mine[1], 4);
        u32 two = odd ? narrow_two(theirs, mine[1]) : narrow_two(mine[0], theirs);
        if (query + odd < GROUP) *(u32*)(out + (query + odd) * HEAD_DIM + 16 * i + 8 * j + lane / 4 / 2 * 2) = two;
      }
  }
};

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
  int thread = threadIdx.x, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  u32 first = shared_address(barriers);
  STAMP(thread == 0, 0);
  Ring ring{shared_address(raw), first, first + 8 * STAGES, 0, 0};
  if (thread == 0) {
    if (ring.slots & 1023) asm volatile("trap;");
    for (int i = 0; i < STAGES; ++i) {
      make_barrier(ring.full + 8 * i, 1);
      make_barrier(ring.empty + 8 * i, KV_HEADS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
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
