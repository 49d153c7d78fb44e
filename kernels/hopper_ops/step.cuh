// What a step consists of, as `decode_step.py` packs it, and how its blocks and warps meet.
#pragma once

#include "ptx.cuh"

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
constexpr int WINDOW = 4;           // units of weights under way: with more, blocks get unequal shares of memory
// Beside attention, whose keys wait in the same queues, the first units of the product after it come with fewer under
// way. What its ring has no room for is asked for into L2 meanwhile: else memory would stand still until attention ends.
// Of few rows only: 8 rows were 1.7% slower with units asked for.
constexpr int CALM_WINDOW = 2;
constexpr int CALM_UNITS = MAX_ROWS <= 2 ? 8 : 0;
constexpr int ASKED_UNITS = MAX_ROWS <= 2 ? 4 : 0;
// A team has ended the unit TEAMS before its own, and WINDOW before that have arrived: so the last user of a slot has.
static_assert(WINDOW + TEAMS <= STAGES, "a parity could be that of the unit before");

constexpr int NORMED = 0;  // f(norm(x) w) + bias: the sums times the row's RMS factor
constexpr int GATED = 1;   // silu(gate) * up of the same; w holds the gate's rows and then the up projection's
constexpr int ADDS = 2;    // residual += sums + bias; out = residual * gain, and sums of its squares
constexpr int ATTENDS = 3;

// As `decode_step.py` packs it: 16 words of 8 bytes.
struct Phase {
  int kind, out_f32;
  int n, k;
  int x_map, w_map;
  int num_squares, in_words; // in_words: `out` has `Word`s of four outputs, each of which tells by itself that it is there
  const half_t* bias;
  const float* squares;    // of x, [rows][num_squares]
  half_t* residual;
  const half_t* gain;
  void* out;
  float* squares_out;      // [rows][n / TILE]
  const Word* x;           // attention: rows of query, key and value heads
  const half_t* q_norm;
  const half_t* k_norm;
  half_t* k_pages;
  half_t* v_pages;
  u64 unused;
};
static_assert(sizeof(Phase) == 128, "as decode_step.py packs it");

struct Step {
  const Phase* phases;
  const TensorMap* w_maps;
  const TensorMap* x_maps; // for this number of rows
  u32* ended;              // blocks, by phase, of all launches; one more for the whole launch
  const int* work;         // [num_items][8], see key_shares.py
  const int* page_table;
  const long long* write_index;
  const half_t* cos;
  const half_t* sin;
  Word* item_sums;         // [num_items][KV_HEADS * GROUP][HEAD_DIM / 2]
  Word* item_stats;        // likewise, one: of the scores, highest and total
  u64* launch;             // its number, from 1 on: the last block of a launch writes the next one's
  int num_phases, num_rows, num_items, table_stride;
  float eps, scale_log2;
};
static_assert(sizeof(Step) == 120, "as decode_step.py packs it");

#ifdef TRACE  // nanoseconds, by phase, stamp and block; the stamps are named in benchmarks/trace_decode_step.py
constexpr int MAX_PHASES = 512, STAMPS = 6, MAX_BLOCKS = 160;
__device__ long long trace[MAX_PHASES][STAMPS][MAX_BLOCKS];
__device__ __forceinline__ void stamp(int phase, int what) {
  long long now = nanoseconds();
  if (threadIdx.x == 0) trace[phase][what][blockIdx.x] = now;
}
#define STAMP(when, what) do { if (when) stamp(index, what); } while (0)
#else
#define STAMP(when, what)
#endif

// What a launch can't mistake for another's. Counters are never reset, and tags never come again: 64 bits.
struct Turn {
  u64 first_tag;
  u32 all_ended;  // of a phase's counter: compared by differences, since it wraps
  __device__ Turn(const Step& s) {
    u64 launch;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(launch) : "l"(s.launch) : "memory");
    first_tag = launch * s.num_phases;
    all_ended = (u32)launch * gridDim.x;
  }
};

// Those that multiply, without the warps that bring the units.
__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

struct Ring {
  u32 slots, weights, rows, empty;  // the slots, and barriers of each: both arrived, and all have read
  int stage, parity;
  __device__ void advance() {
    if (++stage == STAGES) { stage = 0; parity ^= 1; }
  }
};

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

__device__ __forceinline__ void await_all(const u32* ended, const Turn& turn) {
  u32 seen;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(ended) : "memory");
  while ((int)(seen - turn.all_ended) < 0);
}

// All that multiply in this block have ended phase `index`. Who reads by TMA what they wrote fences on its side: a
// fence of all who wrote would cost microseconds.
__device__ __forceinline__ void tell_ended(const Step& s, int index) {
  meet();
  if (threadIdx.x == 0)
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(s.ended + index) : "memory");
}
