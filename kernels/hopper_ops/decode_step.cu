// A whole decode step of few rows in one launch, at the speed of memory, on Hopper.
//
//   phase     a matrix product out[m][n] = sum_k x[m][k] * w[n][k], or attention; the next begins when all blocks
//             have ended it
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
//   HALF 0: bfloat16, 1: float16;  MAX_ROWS of x, 8 at most: the matrix units' narrow side;  STAGES;  HEAD_DIM, GROUP (query heads of a KV head), KV_HEADS, PAGE_SIZE;
//   QK_NORM;  TRACE, if defined: when each phase of each block does what (`trace`)
//
// Layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16" and "Swizzling Modes" of tensor copies (128 bytes).

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short half_t;

constexpr int WARPS = 8;            // that multiply and attend
constexpr int THREADS = 32 * WARPS;
constexpr int TILE = 16;            // rows of the weight: the matrix units' side
constexpr int BK = 256;             // inputs of a unit, in rows of 64: 128 bytes, what the swizzle spans
constexpr int TILES = 2;            // of a pass
constexpr int TEAMS = 4;            // of warps: each takes every fourth unit
constexpr int SHARING = WARPS / TEAMS;
constexpr int TILE_BYTES = TILE * BK * 2;
constexpr int A_BYTES = TILES * TILE_BYTES;
constexpr int SLOT = A_BYTES + MAX_ROWS * BK * 2;
constexpr int REGS = 4;             // sums of a thread, of a tile
constexpr int WINDOW = 4;           // units of weights under way: with more, blocks get unequal shares of memory

constexpr int NORMED = 0;  // f(norm(x) w) + bias: the sums times the row's RMS factor
constexpr int GATED = 1;   // silu(gate) * up of the same; w holds the gate's rows and then the up projection's
constexpr int ADDS = 2;    // residual += sums + bias; out = residual * gain, and sums of its squares
constexpr int ATTENDS = 3;

// As `decode_step.py` packs it: 16 words of 8 bytes.
struct Phase {
  int kind, out_f32;
  int n, k;
  int x_map, w_map;
  int num_squares, pad;
  const half_t* bias;
  const float* squares;    // of x, [rows][num_squares]
  half_t* residual;        // attention: K pages
  const half_t* gain;      // attention: V pages
  void* out;
  float* squares_out;      // [rows][n / TILE]
  const half_t* x;         // attention: rows of query, key and value heads
  const half_t* q_norm;
  const half_t* k_norm;
  u64 unused[3];
};

#ifdef TRACE  // nanoseconds, by phase, stamp and block; the stamps are named in benchmarks/trace_decode_step.py
constexpr int MAX_PHASES = 512, STAMPS = 6, MAX_BLOCKS = 160;
__device__ long long trace[MAX_PHASES][STAMPS][MAX_BLOCKS];
__device__ __forceinline__ void stamp(int phase, int what) {
  long long now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  if (threadIdx.x == 0) trace[phase][what][blockIdx.x] = now;
}
#define STAMP(when, what) do { if (when) stamp(index, what); } while (0)
#else
#define STAMP(when, what)
#endif

struct alignas(64) TensorMap { u64 words[16]; };

struct Step {
  const Phase* phases;
  const TensorMap* w_maps;
  const TensorMap* x_maps; // for this number of rows
  int* ended;              // blocks, by phase; one more for the launch
  const int* work;         // [num_items][8], see key_shares.py
  const int* page_table;
  const long long* write_index;
  const half_t* cos;
  const half_t* sin;
  float* item_sums;        // [num_items][KV_HEADS * GROUP][HEAD_DIM]
  float* item_stats;       // likewise, [2]
  int* item_arrivals;      // [rows][KV_HEADS]
  int num_phases, num_rows, num_items, table_stride;
  float eps, scale_log2;
};

__device__ __forceinline__ float widen(half_t h) {
  float f;
#if HALF
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
#else
  f = __uint_as_float((u32)h << 16);
#endif
  return f;
}

__device__ __forceinline__ half_t narrow(float f) {
  half_t h;
#if HALF
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
#endif
  return h;
}

__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ u64 streaming_policy() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void make_barrier(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void arrive_expecting(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void await(u32 barrier, int parity) {
  asm volatile("{ .reg .pred done;\n"
               "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
               "@!done bra again; }" ::"r"(barrier), "r"(parity) : "memory");
}

// Those that multiply, without the warps that bring the units.
__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

// Boxes of the maps are (64 inputs, rows, 4); of a gated weight, (64 inputs, 8 rows, gate and up, 1, 4): a tile has 8
// rows of each, so that one thread has both sums of an output. What is beyond the inputs arrives as zeros.
__device__ __forceinline__ void bring_x(u32 to, const TensorMap* x, int unit, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
               " [%0], [%1, {%3, %3, %4}], [%2];" ::"r"(to), "l"(x), "r"(barrier), "r"(0), "r"(4 * unit) : "memory");
}

__device__ __forceinline__ void bring_weight(u32 to, const TensorMap* w, int unit, int tile, u32 barrier, u64 policy) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
               " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to), "l"(w), "r"(barrier), "r"(0), "r"(tile * TILE),
               "r"(4 * unit), "l"(policy) : "memory");
}

__device__ __forceinline__ void bring_gated(u32 to, const TensorMap* w, int unit, int tile, u32 barrier, u64 policy) {
  asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
               " [%0], [%1, {%3, %3, %3, %4, %5}], [%2], %6;" ::"r"(to), "l"(w), "r"(barrier), "r"(0), "r"(tile),
               "r"(4 * unit), "l"(policy) : "memory");
}

// What other blocks wrote is read from L2: a first-level cache may have older values.
__device__ __forceinline__ float load_float(const float* p) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ void load_two(const float* p, float (&v)[2]) {
  asm volatile("ld.global.cg.v2.f32 {%0,%1}, [%2];" : "=f"(v[0]), "=f"(v[1]) : "l"(p) : "memory");
}

__device__ __forceinline__ half_t load_half(const half_t* p) {
  half_t v;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(p) : "memory");
  return v;
}

struct Eight { u32 words[4]; };  // halves

__device__ __forceinline__ Eight load_eight(const half_t* p) {
  Eight v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3]) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ void store_eight(half_t* p, Eight v) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.words[0]), "r"(v.words[1]), "r"(v.words[2]),
               "r"(v.words[3]) : "memory");
}

__device__ __forceinline__ void widen_eight(const Eight& v, float (&f)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    f[2 * i] = widen((half_t)(v.words[i] & 0xffff));
    f[2 * i + 1] = widen((half_t)(v.words[i] >> 16));
  }
}

#if HALF
#define TYPES "f32.f16.f16.f32"
#else
#define TYPES "f32.bf16.bf16.f32"
#endif

__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// d += 16 rows x 16 inputs of the weight, times 8 rows of x.
__device__ __forceinline__ void multiply(float (&d)[REGS], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col." TYPES " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The tiles of a product that this block has: neighbours, of which others have one more or fewer.
struct Share {
  int tile, count;
  __device__ Share(const Phase& p) {
    int tiles = (p.kind == GATED ? 2 * p.n : p.n) / TILE, blocks = gridDim.x, block = blockIdx.x;
    tile = block * (tiles / blocks) + min(block, tiles % blocks);
    count = tiles / blocks + (block < tiles % blocks);
  }
};

// Blocks begin at different inputs: together they would ask the same few channels of memory.
__device__ __forceinline__ int first_unit(int units) { return (int)blockIdx.x * units / (int)gridDim.x; }

// -- the ends of phases ------------------------------------------------------------------------------------------

__device__ __forceinline__ void await_all(const int* ended) {
  int seen;
  do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(ended) : "memory");
  while (seen < (int)gridDim.x);
}

// All that multiply in this block have ended phase `index`. Who reads by TMA what they wrote fences on its side: a
// fence of all who wrote would cost microseconds.
__device__ __forceinline__ void tell_ended(const Step& s, int index) {
  meet();
  if (threadIdx.x == 0)
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(s.ended + index) : "memory");
}

// Whether this block is the last of `count` to come here; then it sees what the others wrote.
__device__ __forceinline__ bool is_last_of(int count, int* counter, int* shared) {
  meet();
  if (threadIdx.x == 0) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    *shared = before == count - 1;
    if (*shared) *counter = 0;
  }
  meet();
  return *shared;
}

// -- products ----------------------------------------------------------------------------------------------------

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

struct Ring {
  u32 slots, weights, rows, empty;  // the slots, and barriers of each: both arrived, and all have read
  int stage, parity;
  __device__ void advance() {
    if (++stage == STAGES) { stage = 0; parity ^= 1; }
  }
};

// Where a lane finds its rows of the matrices of 16 inputs, in a unit whose `rows` are 128 bytes of 64 inputs each,
// swizzled; `first` is the row that the lane would have among the unit's first.
__device__ __forceinline__ u32 place_in_unit(int first, int rows, int sixteen, int half) {
  int row = sixteen / 4 * rows + first;
  return row * 128 + ((2 * (sixteen % 4) + half ^ row & 7) << 4);
}

__device__ __forceinline__ void multiply_phase(const Step& s, const Phase& p, Ring& ring, float* factor, float* pool,
                                               int index) {
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
      await(ring.rows + 8 * ring.stage, ring.parity);
#pragma unroll
      for (int i = 0; i < STEPS / 2; ++i) load_matrices(b[i], slot + b_place[i]);
      await(ring.weights + 8 * ring.stage, ring.parity);
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
      __syncwarp();
      if (lane == 0) arrive(ring.empty + 8 * ring.stage);
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
      if (p.kind == NORMED) finish_normed(sums, tile, p, s.num_rows, factor);
      else if (p.kind == GATED) finish_gated(sums, tile, p, s.num_rows, factor);
      else finish_adds(sums, before, tile, p, s.num_rows);
    }
    if (done + TILES < share.count) meet();  // before the pool is written again
  }
}

// -- attention ---------------------------------------------------------------------------------------------------

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
  half_t* k_pages = p.residual;
  half_t* v_pages = (half_t*)p.gain;
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

// -- the roles of warps ------------------------------------------------------------------------------------------

__device__ __forceinline__ void bring_weights(const Step& s, Ring ring) {
  u64 policy = streaming_policy();
  int brought = 0;
#pragma unroll 1
  for (int index = 0; index < s.num_phases; ++index) {
    const Phase p = s.phases[index];
    if (p.kind == ATTENDS) continue;
    const TensorMap* map = s.w_maps + p.w_map;
    bool gated = p.kind == GATED;
    int units = (p.k + BK - 1) / BK;
    Share share(p);
#pragma unroll 1
    for (int done = 0; done < share.count; done += TILES) {
      int tile = share.tile + done, tiles = min(TILES, share.count - done);
#pragma unroll 1
      for (int count = 0, unit = first_unit(units); count < units; ++count, unit = unit + 1 == units ? 0 : unit + 1) {
        await(ring.empty + 8 * ring.stage, ring.parity ^ 1);
        // What waits in the memory's queues makes everybody else wait: no more than keeps them busy.
        if (brought >= WINDOW) {
          int before = brought - WINDOW;
          await(ring.weights + 8 * (before % STAGES), before / STAGES & 1);
        }
        ++brought;
        u32 to = ring.slots + ring.stage * SLOT, barrier = ring.weights + 8 * ring.stage;
        arrive_expecting(barrier, tiles * TILE_BYTES);
#pragma unroll 1
        for (int i = 0; i < tiles; ++i) {
          if (gated) bring_gated(to + i * TILE_BYTES, map, unit, tile + i, barrier, policy);
          else bring_weight(to + i * TILE_BYTES, map, unit, tile + i, barrier, policy);
        }
        ring.advance();
      }
    }
  }
}

__device__ __forceinline__ void bring_rows(const Step& s, Ring ring) {
#pragma unroll 1
  for (int index = 0; index < s.num_phases; ++index) {
    const Phase p = s.phases[index];
    if (index + 1 < s.num_phases) {  // maps are far away: asked for a phase ahead
      asm volatile("prefetch.tensormap [%0];" ::"l"(s.w_maps + s.phases[index + 1].w_map) : "memory");
      asm volatile("prefetch.tensormap [%0];" ::"l"(s.x_maps + s.phases[index + 1].x_map) : "memory");
    }
    if (p.kind == ATTENDS) continue;
    const TensorMap* map = s.x_maps + p.x_map;
    int units = (p.k + BK - 1) / BK, bytes = s.num_rows * BK * 2;
    Share share(p);
    if (share.count == 0) continue;  // and nobody here would know when the end of the phase before is forgotten
    if (index > 0) {
      await_all(s.ended + index - 1);
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
  __shared__ float factor[MAX_ROWS];
  __shared__ union { float pool[TILES * WARPS * REGS * 32]; AttentionScratch attention; } scratch;
  __shared__ int is_last;
  __shared__ u64 barriers[3 * STAGES];
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
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
  }
  __syncthreads();
  if (thread >= THREADS) {
    if (thread == THREADS) bring_weights(s, ring);
    if (thread == THREADS + 32) bring_rows(s, ring);
    return;
  }
  auto fetch_phase = [&](int index) {
    constexpr int WORDS = sizeof(Phase) / 8;
    if (thread < WORDS && index < s.num_phases)
      ((u64*)&phase[index % 2])[thread] = ((const u64*)(s.phases + index))[thread];
  };
  fetch_phase(0);
  meet();
#pragma unroll 1
  for (int index = 0; index < s.num_phases; ++index) {
    fetch_phase(index + 1);
    auto begin_phase = [&] {
      if (index == 0) return;
      if (thread == 0) {
        await_all(s.ended + index - 1);
        if (blockIdx.x == 0 && index > 1) s.ended[index - 2] = 0;  // all have seen it
      }
      meet();
    };
    const Phase& p = phase[index % 2];
    if (p.kind == ATTENDS) {
      attend_phase(s, p, scratch.attention, &is_last, index, [&] { begin_phase(); STAMP(true, 0); });
    } else {
      begin_phase();
      STAMP(true, 0);
      multiply_phase(s, p, ring, factor, scratch.pool, index);
    }
    STAMP(true, 4);
    if (index + 1 < s.num_phases) tell_ended(s, index);
    STAMP(true, 5);
  }
  meet();
  if (thread == 0) {
    __threadfence();
    int* launch_ended = s.ended + s.num_phases;
    if (atomicAdd(launch_ended, 1) == (int)gridDim.x - 1) {
      *launch_ended = 0;
      if (s.num_phases > 1) s.ended[s.num_phases - 2] = 0;
    }
  }
}
