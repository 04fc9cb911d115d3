// One block quantises one tile of 128 rows × 128 columns and writes every layout that was asked for, so that the
// tensor is read once.
//
// Defined from outside: INPUT_FP32 (else BF16), POWER_OF_TWO, BLOCKS (one scale for the whole tile: weights).
// Null pointers are layouts that nobody wants.
//
// A thread holds 8 rows × 8 columns: 16 bytes of BF16 a row to read, 8 bytes of FP8 in either direction to write.
using u8 = unsigned char;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int TILE = 128, THREADS = 256;
// 2^-60: a tile below counts as zero, and neither the scale nor its inverse leaves FP32.
constexpr float FLOOR = 8.673617379884035e-19f;

static __device__ __forceinline__ float scale_of(float amax) {
  const float scale = fmaxf(amax, FLOOR) / 448.0f;
  return POWER_OF_TWO ? __uint_as_float((__float_as_uint(scale) + 0x7fffffu) & 0x7f800000u) : scale;
}

static __device__ __forceinline__ u32 fp8_pair(float low, float high) {
  unsigned short pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

// The expert that owns row tile `tile`, where each expert's rows are cut into tiles of its own.
struct Place {
  int first_row, valid_rows;  // in the tensor; valid_rows <= 0: a tile that nobody owns
};

static __device__ __forceinline__ Place find(const int* counts, int num_experts, int num_rows, int tile) {
  if (!counts) return {tile * TILE, min(TILE, num_rows - tile * TILE)};
  const int lane = threadIdx.x % 32;
  int rows_before = 0, tiles_before = 0;
  for (int first = 0; first < num_experts; first += 32) {
    const int count = first + lane < num_experts ? __ldg(counts + first + lane) : 0;
    int rows = count, tiles = (count + TILE - 1) / TILE;
    for (int step = 1; step < 32; step *= 2) {
      const int r = __shfl_up_sync(~0u, rows, step), t = __shfl_up_sync(~0u, tiles, step);
      if (lane >= step) rows += r, tiles += t;
    }
    const u32 past = __ballot_sync(~0u, tiles_before + tiles > tile);
    if (past) {
      const int owner = __ffs(past) - 1;
      const int own_count = __shfl_sync(~0u, count, owner);
      const int row = rows_before + __shfl_sync(~0u, rows, owner) - own_count;
      const int tiles_to_owner = tiles_before + __shfl_sync(~0u, tiles, owner) - (own_count + TILE - 1) / TILE;
      const int local = (tile - tiles_to_owner) * TILE;
      return {row + local, min(TILE, own_count - local)};
    }
    rows_before += __shfl_sync(~0u, rows, 31);
    tiles_before += __shfl_sync(~0u, tiles, 31);
  }
  return {0, 0};
}

static __device__ __forceinline__ void load(float (&v)[8], const void* x, long long at, bool there) {
  u32 raw[INPUT_FP32 ? 8 : 4] = {};
  if (there) {
    const uint4* from = (const uint4*)((const u8*)x + at * (INPUT_FP32 ? 4 : 2));
#pragma unroll
    for (int i = 0; i < (INPUT_FP32 ? 2 : 1); i++) {
      const uint4 part = __ldcs(from + i);
      raw[4 * i] = part.x, raw[4 * i + 1] = part.y, raw[4 * i + 2] = part.z, raw[4 * i + 3] = part.w;
    }
  }
#pragma unroll
  for (int i = 0; i < 8; i++) {
    if (INPUT_FP32) {
      v[i] = __uint_as_float(raw[i % (INPUT_FP32 ? 8 : 4)]);
    } else {
      v[i] = __uint_as_float(i % 2 ? raw[i / 2] & 0xffff0000u : raw[i / 2] << 16);
    }
  }
}

struct Tile {
  float v[8][8];  // [row][column]
  int row, column;  // of v[0][0], within the tile
};

// 8 bytes a thread, 128 a row.
static __device__ __forceinline__ void write_rows(const Tile& t, const float (&inverse)[8], u8* values, int valid_rows,
                                                  bool column_there, int C) {
#pragma unroll
  for (int r = 0; r < 8; r++) {
    if (t.row + r >= valid_rows || !column_there) continue;
    const float s = inverse[r];
    const float* v = t.v[r];
    const u32 low = fp8_pair(v[0] * s, v[1] * s) | fp8_pair(v[2] * s, v[3] * s) << 16;
    const u32 high = fp8_pair(v[4] * s, v[5] * s) | fp8_pair(v[6] * s, v[7] * s) << 16;
    *(uint2*)(values + (long long)(t.row + r) * C + t.column) = make_uint2(low, high);
  }
}

// Through shared memory: 16-byte pieces are permuted by the column's group of eight, which keeps the banks apart.
static __device__ __forceinline__ void write_transposed(const Tile& t, const float (&inverse)[8], u8* shared,
                                                        u8* values, int valid_columns, int rows_to_write,
                                                        long long stride) {
#pragma unroll
  for (int c = 0; c < 8; c++) {
    const float s = inverse[c];
    const u32 low = fp8_pair(t.v[0][c] * s, t.v[1][c] * s) | fp8_pair(t.v[2][c] * s, t.v[3][c] * s) << 16;
    const u32 high = fp8_pair(t.v[4][c] * s, t.v[5][c] * s) | fp8_pair(t.v[6][c] * s, t.v[7][c] * s) << 16;
    const int column = t.column + c, piece = t.row / 16 ^ (column / 8 & 7);
    *(uint2*)(shared + column * TILE + piece * 16 + t.row % 16) = make_uint2(low, high);
  }
  __syncthreads();
#pragma unroll
  for (int pass = 0; pass < 4; pass++) {
    const int column = pass * 32 + threadIdx.x / 8, first = threadIdx.x % 8 * 16;
    const uint4 piece = *(const uint4*)(shared + column * TILE + (first / 16 ^ (column / 8 & 7)) * 16);
    if (column < valid_columns && first < rows_to_write) *(uint4*)(values + column * stride + first) = piece;
  }
}

// The largest of `mine` over the 16 threads that share a row.
static __device__ __forceinline__ float over_row(float mine) {
#pragma unroll
  for (int step = 1; step < 16; step *= 2) mine = fmaxf(mine, __shfl_xor_sync(~0u, mine, step));
  return mine;
}

// x [matrices, R, C] → values [matrices, R, C] and scales; transposed [matrices, C, P] and its scales. For weights P
// is R; for activations P is the padded number of rows and counts may cut the rows into experts.
extern "C" __global__ void __launch_bounds__(THREADS)
    quantise(const void* x, u8* values, float* scales, u8* transposed, float* scales_transposed, const int* counts,
             int num_experts, int R, int C, int P, int scale_stride, int scale_stride_transposed) {
  __shared__ __align__(16) u8 shared[TILE * TILE];
  __shared__ float column_max[8][TILE];
  const int column_tile = blockIdx.x, row_tile = blockIdx.y % ((P + TILE - 1) / TILE);
  const int matrix = blockIdx.y / ((P + TILE - 1) / TILE), row_tiles = (P + TILE - 1) / TILE;
  const Place place = find(counts, num_experts, R, row_tile);
  Tile t;
  t.row = threadIdx.x / 16 * 8, t.column = threadIdx.x % 16 * 8;
  const int column = column_tile * TILE + t.column;
  const bool column_there = column < C;
  const long long first = ((long long)matrix * R + place.first_row) * C;
#pragma unroll
  for (int r = 0; r < 8; r++) {
    load(t.v[r], x, first + (long long)(t.row + r) * C + column, column_there && t.row + r < place.valid_rows);
  }
  float row_amax[8], column_amax[8];
#pragma unroll
  for (int r = 0; r < 8; r++) {
    row_amax[r] = 0;
#pragma unroll
    for (int c = 0; c < 8; c++) {
      row_amax[r] = fmaxf(row_amax[r], fabsf(t.v[r][c]));
      column_amax[c] = r ? fmaxf(column_amax[c], fabsf(t.v[r][c])) : fabsf(t.v[r][c]);
    }
    row_amax[r] = over_row(row_amax[r]);
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float inverse[8];
  if (BLOCKS) {
    float amax = 0;
#pragma unroll
    for (int r = 0; r < 8; r++) amax = fmaxf(amax, row_amax[r]);
    amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 16));
    if (lane == 0) column_max[0][warp] = amax;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < 8; w++) amax = fmaxf(amax, column_max[0][w]);
    const float scale = scale_of(amax);
    const int column_tiles = (C + TILE - 1) / TILE;
    if (threadIdx.x == 0) {
      scales[((long long)matrix * row_tiles + row_tile) * column_tiles + column_tile] = scale;
      if (transposed) scales_transposed[((long long)matrix * column_tiles + column_tile) * row_tiles + row_tile] = scale;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) inverse[i] = 1.0f / scale;
  }
  if (values) {
    if (!BLOCKS) {
#pragma unroll
      for (int r = 0; r < 8; r++) {
        const float scale = scale_of(row_amax[r]);
        inverse[r] = 1.0f / scale;
        if (t.column == 0 && t.row + r < place.valid_rows) {
          scales[(long long)column_tile * scale_stride + place.first_row + t.row + r] = scale;
        }
      }
    }
    write_rows(t, inverse, values + first + column_tile * TILE, place.valid_rows, column_there, C);
  }
  if (!transposed) return;
  if (!BLOCKS) {
#pragma unroll
    for (int c = 0; c < 8; c++) {
      column_amax[c] = fmaxf(column_amax[c], __shfl_xor_sync(~0u, column_amax[c], 16));
      if (lane < 16) column_max[warp][t.column + c] = column_amax[c];
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < 8; c++) {
      float amax = 0;
#pragma unroll
      for (int w = 0; w < 8; w++) amax = fmaxf(amax, column_max[w][t.column + c]);
      const float scale = scale_of(amax);
      inverse[c] = 1.0f / scale;
      if (threadIdx.x < 16 && column_there) {
        scales_transposed[(long long)row_tile * scale_stride_transposed + column + c] = scale;
      }
    }
  }
  const int rows_to_write = BLOCKS ? place.valid_rows : TILE;
  u8* to = transposed + ((long long)matrix * C + column_tile * TILE) * P + row_tile * TILE;
  write_transposed(t, inverse, shared, to, C - column_tile * TILE, rows_to_write, P);
}
