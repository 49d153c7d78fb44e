// What a launch of `product_chain.cu` consists of, as `product_chain.py` packs it, and how its blocks go through it.
#pragma once

#include "wgmma.cuh"

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
  long long now = nanoseconds();
  if (blockIdx.x < MAX_BLOCKS && c.launch < MAX_LAUNCHES) trace[c.launch][index][what][blockIdx.x] = now;
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
