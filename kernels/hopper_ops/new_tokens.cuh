// A new token's queries, key and value in `page_attention.cu`: normed, rotated, put where they belong.
#pragma once

#include "page_step.cuh"

// Rotates dimensions (x) and those half a head further (y), two neighbours of each.
struct Turned { u32 x, y; };
__device__ __forceinline__ Turned rotate(const float (&x)[2], const float (&y)[2], u32 cos, u32 sin) {
  float c[2] = {low_of(cos), high_of(cos)}, s[2] = {low_of(sin), high_of(sin)};
  return {narrow_two(x[0] * c[0] - y[0] * s[0], x[1] * c[1] - y[1] * s[1]),
          narrow_two(y[0] * c[0] + x[0] * s[0], y[1] * c[1] + x[1] * s[1])};
}

// Two dimensions times the norm's factor and gains, where there is a norm.
__device__ __forceinline__ void normed(u32 two, const half_t* gains, float factor, float (&out)[2]) {
  u32 gain = QK_NORM ? *(const u32*)gains : 0;
  out[0] = low_of(two) * (QK_NORM ? factor * low_of(gain) : 1.f);
  out[1] = high_of(two) * (QK_NORM ? factor * high_of(gain) : 1.f);
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
#pragma unroll
  for (int i = 0; i < STEPS / 2; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float x[2], y[2];
      normed(q[i][j], a.q_norm + at + 16 * i + 8 * j, factor, x);
      normed(q[i + STEPS / 2][j], a.q_norm + at + 16 * i + 8 * j + HEAD_DIM / 2, factor, y);
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
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) {
    int dim = 64 * i + 2 * lane;
    if (dim >= HEAD_DIM / 2) break;
    u64 angle = (u64)position * (HEAD_DIM / 2) + dim;
    float x[2], y[2];
    normed(low[i], a.k_norm + dim, factor, x);
    normed(high[i], a.k_norm + dim + HEAD_DIM / 2, factor, y);
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
