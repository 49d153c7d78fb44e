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

#include "wgmma.cuh"
#include "multiply.cuh"

constexpr int TEAMS = 2;                   // of four warps that multiply
constexpr int WARPS = 4 * TEAMS;
constexpr int THREADS = 32 * WARPS;
constexpr int BRINGS_WEIGHTS = WARPS, BRINGS_X = WARPS + 1, FINDS_FACTORS = WARPS + 2;
constexpr int ALL_THREADS = 32 * (WARPS + 3);
constexpr int ROW_BYTES = 128;             // of 64 inputs, what the swizzle spans
constexpr int MAX_PRODUCTS = 4;            // of a launch
constexpr int MAX_JOINS = 128;             // tiles of a product whose parts are joined
constexpr int COUNTERS = MAX_PRODUCTS * (1 + MAX_JOINS * WARPS);
constexpr int QUEUE = 16;                  // units under way
constexpr int SMALL = 64;                  // rows of the weight: less would keep two teams busy with x alone

constexpr int QKV = 0, O = 1, GATE_UP = 2, DOWN = 3, VOCABULARY = 4;  // products
__device__ constexpr int tiles[] = {TILES}, depths[] = {DEPTHS}, all_splits[] = {SPLITS};
__device__ __forceinline__ constexpr int weight_bytes(int which) { return depths[which] * tiles[which] * ROW_BYTES; }
__device__ __forceinline__ constexpr int x_bytes(int which) { return depths[which] * ROWS * ROW_BYTES; }
__device__ __forceinline__ constexpr bool is_small(int which) { return tiles[which] <= SMALL && which != GATE_UP; }

// As `product_chain.py` packs it.
struct Product {
  TensorMap w, x;
  const half_t* bias;
  const float* squares;    // of x, [num_squares][ROWS]
  half_t* residual;
  const half_t* gain;
  void* out;               // [num_rows][n]
  float* squares_out;      // [items * TEAMS][ROWS]
  int which, n, k;         // n: outputs
  int num_tiles, num_squares;
  int unused[3];
  u64 padding[6];
};
static_assert(sizeof(Product) == 384, "as product_chain.py packs it");

struct Chain {
  Product products[MAX_PRODUCTS];
  float4* parts;           // [items][tile / 8 / TEAMS][THREADS]
  u32* counters;           // of this launch, zero when it begins
  u32* others;             // of the one before, which it clears
  int num_products, num_rows;
  float eps;
  int launch;
};
static_assert(sizeof(Chain) == 4 * 384 + 64, "as product_chain.py packs it");

#ifdef TRACE  // nanoseconds, by launch, product, stamp and block; named in benchmarks/trace_product_chain.py
constexpr int STAMPS = 6, MAX_BLOCKS = 160, MAX_LAUNCHES = 96;
__device__ long long trace[MAX_LAUNCHES][MAX_PRODUCTS][STAMPS][MAX_BLOCKS];
__device__ __forceinline__ void stamp(const Chain& c, int index, int what) {
  long long now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  trace[c.launch][index][what][blockIdx.x] = now;
}
#define STAMP(when, what) do { if (when) stamp(c, index, what); } while (0)
#else
#define STAMP(when, what)
#endif

__device__ __forceinline__ u32* ended(const Chain& c, int index) { return c.counters + index; }
__device__ __forceinline__ u32* joined(const Chain& c, int index, int tile, int warp) {
  return c.counters + MAX_PRODUCTS + (index * MAX_JOINS + tile) * WARPS + warp;
}

// Those that multiply.
__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

// The compiler has to know that it is the same for all threads of a warp.
__device__ __forceinline__ int uniform_warp() { return __shfl_sync(~0u, threadIdx.x / 32, 0); }

// Both rings as those who multiply go through them. A unit lies in one piece: what is left at a ring's end is left.
struct Ring {
  u32 w_first, x_first, weights, rows, empty;  // the rings, and barriers of each unit: both have arrived, and all have read
  int unit, parity, w_at, x_at;
  __device__ void place(int w_bytes, int x_bytes) {
    if (w_at + w_bytes > W_BYTES) w_at = 0;
    if (x_at + x_bytes > X_BYTES) x_at = 0;
  }
  __device__ u32 w() const { return w_first + w_at; }
  __device__ u32 x() const { return x_first + x_at; }
  __device__ void advance(int w_bytes, int x_bytes) {
    w_at += w_bytes;
    x_at += x_bytes;
    if (++unit == QUEUE) { unit = 0; parity ^= 1; }
  }
};

// A ring as the one thread goes through it that brings its units. Positions only rise: a ring's length further is the same
// place.
struct Room {
  const u32 empty;    // barriers
  u32* starts;        // of units, [QUEUE] in shared memory
  const u32 length;
  u32 at = 0, at_place = 0, tail_at = 0, head = 0, tail = 0;  // the next unit, and the oldest that may still be read
  __device__ Room(u32 empty, u32* starts, u32 length) : empty(empty), starts(starts), length(length) {}
  // Waits until there is room for the next unit. Returns its place; `head - 1` is its number then.
  __device__ u32 take(u32 bytes) {
    if (at_place + bytes > length) {
      at += length - at_place;
      at_place = 0;
    }
    starts[head % QUEUE] = at;
    while (at + bytes - tail_at > length || head - tail == QUEUE) {
      await(empty + 8 * (tail % QUEUE), tail / QUEUE & 1);
      ++tail;
      tail_at = starts[tail % QUEUE];
    }
    u32 place = at_place;
    at += bytes;
    at_place += bytes;
    ++head;
    return place;
  }
};

// A block's items of a product, and the units of each, in the order that all its warps go through them.
struct Walk {
  int item, items;
  __device__ Walk(const Product& p) : item(blockIdx.x), items(p.num_tiles * all_splits[p.which]) {}
  __device__ bool goes_on() const { return item < items; }
  __device__ void advance() { item += gridDim.x; }
};

struct Part {
  int tile, split, first, count, unit;  // units of the part, and the one to begin with
  __device__ Part(const Product& p, int item) {
    int splits = all_splits[p.which], units = (p.k / 64 + depths[p.which] - 1) / depths[p.which];
    tile = item / splits;
    split = item % splits;
    first = units * split / splits;
    count = units * (split + 1) / splits - first;
    // Blocks begin at different inputs: together they would ask the same few channels of memory.
    unit = first + (int)blockIdx.x * count / (int)gridDim.x;
  }
  __device__ void advance() {
    if (++unit == first + count) unit = first;
  }
};

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

// A thread's four sums of eight columns: two neighbours of a row, and of the row 8 below.
struct Four { float v[4]; };
__device__ __forceinline__ int row_of(int second) { return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + 8 * second; }
__device__ __forceinline__ int team() { return threadIdx.x / 128; }

__device__ __forceinline__ void store_two(half_t* to, float a, float b) { *(u32*)to = narrow(a) | (u32)narrow(b) << 16; }
__device__ __forceinline__ void store_two(float* to, float a, float b) { *(float2*)to = {a, b}; }

// n: the column of a thread's first sum.
template <typename Output>
__device__ __forceinline__ void finish_normed(const Product& p, int num_rows, const float* factors, int n, const Four& sums) {
  if (n >= p.n) return;
  float bias[2] = {p.bias ? widen(p.bias[n]) : 0.f, p.bias ? widen(p.bias[n + 1]) : 0.f};
#pragma unroll
  for (int second = 0; second < 2; ++second) {
    int m = row_of(second);
    if (m < num_rows)
      store_two((Output*)p.out + (u64)m * p.n + n, sums.v[2 * second] * factors[m] + bias[0], sums.v[2 * second + 1] * factors[m] + bias[1]);
  }
}

__device__ __forceinline__ float silu_times(float gate, float up) {
  return __fdividef(gate, 1.f + power_of_two(-1.4426950408889634f * gate)) * up;
}

__device__ __forceinline__ void finish_gated(const Product& p, int num_rows, const float* factors, int n, const Four& gate, const Four& up) {
  if (n >= p.n) return;
  float gate_bias[2] = {0.f, 0.f}, up_bias[2] = {0.f, 0.f};
  if (p.bias)
    for (int i = 0; i < 2; ++i) { gate_bias[i] = widen(p.bias[n + i]); up_bias[i] = widen(p.bias[p.n + n + i]); }
#pragma unroll
  for (int second = 0; second < 2; ++second) {
    int m = row_of(second);
    if (m >= num_rows) continue;
    float out[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      out[i] = silu_times(gate.v[2 * second + i] * factors[m] + gate_bias[i], up.v[2 * second + i] * factors[m] + up_bias[i]);
    store_two((half_t*)p.out + (u64)m * p.n + n, out[0], out[1]);
  }
}

// What an addition needs besides its sums, of eight columns; asked for before they are complete.
struct Before {
  u32 residual[2], gain, bias;
  __device__ void load(const Product& p, int num_rows, int n) {
    n = min(n, p.n - 2);
#pragma unroll
    for (int second = 0; second < 2; ++second)
      residual[second] = load_two(p.residual + (u64)min(row_of(second), num_rows - 1) * p.n + n);
    gain = *(const u32*)(p.gain + n);
    bias = p.bias ? *(const u32*)(p.bias + n) : 0;
  }
};

__device__ __forceinline__ float widen_of(u32 two, int i) { return widen((half_t)(i ? two >> 16 : two & 0xffff)); }

__device__ __forceinline__ void finish_adds(const Product& p, int num_rows, int n, const Four& sums, const Before& before, float (&squares)[2]) {
  if (n >= p.n) return;
#pragma unroll
  for (int second = 0; second < 2; ++second) {
    int m = row_of(second);
    half_t stored[2];
    float after[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      stored[i] = narrow(widen_of(before.residual[second], i) + sums.v[2 * second + i] + widen_of(before.bias, i));
      after[i] = widen(stored[i]);
      squares[second] += after[i] * after[i];
    }
    if (m >= num_rows) continue;
    u64 place = (u64)m * p.n + n;
    *(u32*)(p.residual + place) = stored[0] | (u32)stored[1] << 16;
    store_two((half_t*)p.out + place, after[0] * widen_of(before.gain, 0), after[1] * widen_of(before.gain, 1));
  }
}

__device__ __forceinline__ void tell_squares(const Product& p, int item, float (&squares)[2]) {
#pragma unroll
  for (int second = 0; second < 2; ++second) {
    squares[second] += __shfl_xor_sync(~0u, squares[second], 1);
    squares[second] += __shfl_xor_sync(~0u, squares[second], 2);
    if (threadIdx.x % 4 == 0) p.squares_out[(item * TEAMS + team()) * ROWS + row_of(second)] = squares[second];
  }
}

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

// What tells a block that others' parts are there; each of its products has a turn.
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

template <int WHICH>
__device__ __forceinline__ void multiply_product(const Chain& c, int index, Ring& ring, const float* factors, u32 found, float4* pool, Bell& bell) {
  using Mine = Columns<WHICH>;
  constexpr int DEPTH = depths[WHICH], SPLIT = Mine::SPLIT, EIGHTS = Mine::EIGHTS;
  constexpr bool SHARED = is_small(WHICH);  // by both teams
  constexpr int N = SHARED ? tiles[WHICH] : tiles[WHICH] / TEAMS;
  constexpr bool ADDS = WHICH == O || WHICH == DOWN;
  constexpr int W_UNIT = weight_bytes(WHICH), X_UNIT = x_bytes(WHICH);
  static_assert(W_UNIT <= W_BYTES && X_UNIT <= X_BYTES, "a unit fits");
  const Product& p = c.products[index];
  int warp = uniform_warp(), lane = threadIdx.x % 32;
  bool has_rows = warp % 4 * 16 < ROWS, knows_factors = false;
  auto release = [&](int unit) {
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
        release(ring.unit);
      } else {
        multiply_unit();
        await_products<1>();  // those of the unit before
        if (i > 0) release(last);
        last = ring.unit;
      }
    }
    await_products<0>();
    keep(d);
    if (!SHARED) release(last);
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
      float4* to = c.parts + (u64)at.item * EIGHTS * THREADS + threadIdx.x;
#pragma unroll
      for (int i = 0; i < EIGHTS; ++i) to[i * THREADS] = {d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]};
      __syncwarp();
      // A warp has the same rows in all blocks: it waits for those warps only.
      if (lane == 0) {
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
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
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
