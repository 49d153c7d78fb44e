// The rings of weights and of x of `product_chain.cu`: of bytes, for units of several sizes.
#pragma once

#include "chain.cuh"

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
