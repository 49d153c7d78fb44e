// What `product_chain.cu` makes of complete sums.
#pragma once

#include "chain.cuh"

// A thread's four sums of eight columns: two neighbours of a row, and of the row 8 below.
struct Four { float v[4]; };
__device__ __forceinline__ int row_of(int second) { return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + 8 * second; }
__device__ __forceinline__ int team() { return threadIdx.x / 128; }

__device__ __forceinline__ void store_two(half_t* to, float a, float b) { *(u32*)to = narrow_two(a, b); }
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
