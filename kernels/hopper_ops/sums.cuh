// The online softmax of `page_attention.cu`, on the matrix units.
#pragma once

#include "page_step.cuh"

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
