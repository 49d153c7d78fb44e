// Which tiles of which rows' keys each block of `page_attention.cu` has. Each finds it out by itself.
#pragma once

#include "wgmma.cuh"

constexpr int TILE = 16;       // keys
constexpr int MOST_ROWS = 64;  // two of each lane
constexpr int LEAST = 8;       // tiles of a block: more parts of a row take longer to join than they save

// Of a step, on the device before any of its launches; as `page_attention.py` packs it.
struct Rows {
  const long long* slot;
  const long long* position;  // of the new token
  const int* page_table;      // by slot
  int num_rows, table_stride, page_size, unused;

  // The token of the pool that the tile from `token` of a sequence begins with.
  __device__ int place_of(int slot, int token) const {
    return page_table[(u64)slot * table_stride + token / page_size] * page_size + token % page_size;
  }
};

// Of a step, as all warps of a block see it.
struct Shares {
  int starts[MOST_ROWS + 1];  // of each row's tiles; the last: of all
  int slots[MOST_ROWS], positions[MOST_ROWS];
  int begin, end, num_blocks;  // this block's tiles; blocks that have some

  // One warp: two rows of each lane.
  __device__ void find(const Rows& rows) {
    int lane = threadIdx.x % 32, tiles[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int row = 2 * lane + i;
      tiles[i] = 0;
      if (row < rows.num_rows) {
        slots[row] = (int)rows.slot[row];
        positions[row] = (int)rows.position[row];
        tiles[i] = positions[row] / TILE + 1;
      }
    }
    int up_to = tiles[0] + tiles[1];
#pragma unroll
    for (int apart = 1; apart < 32; apart *= 2) {
      int other = __shfl_up_sync(~0u, up_to, apart);
      if (lane >= apart) up_to += other;
    }
    int all = __shfl_sync(~0u, up_to, 31);
    starts[2 * lane] = up_to - tiles[0] - tiles[1];
    starts[2 * lane + 1] = up_to - tiles[1];
    if (lane == 0) {
      starts[MOST_ROWS] = all;
      num_blocks = max(1, min((int)gridDim.x, all / LEAST));
      begin = begin_of(blockIdx.x);
      end = begin_of(blockIdx.x + 1);
    }
  }

  __device__ int begin_of(int block) const {
    int all = starts[MOST_ROWS];
    return block < num_blocks ? (int)((u64)block * all / num_blocks) : all;
  }

  // Starts rise.
  __device__ int row_of(int tile) const {
    int row = 0;
#pragma unroll
    for (int step = MOST_ROWS / 2; step; step /= 2)
      if (starts[row + step] <= tile) row += step;
    return row;
  }

  __device__ int block_of(int tile) const { return (int)(((u64)(tile + 1) * num_blocks - 1) / starts[MOST_ROWS]); }

  __device__ int place_of(const Rows& rows, int tile) const {
    int row = row_of(tile);
    return rows.place_of(slots[row], (tile - starts[row]) * TILE);
  }
};

// The blocks that have a row. Each has one row at most that it ends and did not begin, and one that it begins and does not end.
struct RowParts {
  int first, last;
  __device__ RowParts(const Shares& s, int row)
      : first(s.block_of(s.starts[row])), last(s.block_of(s.starts[row + 1] - 1)) {}
  __device__ int place(int block) const { return 2 * block + (block == first); }
};
