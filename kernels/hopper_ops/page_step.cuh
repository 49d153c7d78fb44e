// What a launch of `page_attention.cu` consists of, as `page_attention.py` packs it.
#pragma once

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
  long long now = nanoseconds();
  if (blockIdx.x < MAX_BLOCKS && a.layer < MAX_LAYERS) trace[a.layer][what][blockIdx.x] = now;
}
#define STAMP(when, what) do { if (when) stamp(a, what); } while (0)
#else
#define STAMP(when, what)
#endif
