// What every pass that ends in FP8 is made of: a block owns a tile of 128 rows × 128 columns, fills it with values of its
// own making, and writes all layouts of it that were asked for. No header is included: NVRTC needs no CUDA.
//
// Defined from outside: POWER_OF_TWO (the scales' rule). 256 threads; a thread holds 8 rows × 8 columns: 16 bytes of
// BF16 a row to read, 8 bytes of FP8 in either direction to write. Activations are held in BF16, which leaves registers
// for four blocks on a multiprocessor: while one waits for its loads, the others work.
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int TILE = 128, THREADS = 256;
// 2^-60: a tile below is scaled as if it reached this, and neither the scale nor its inverse leaves FP32.
constexpr float FLOOR = 8.673617379884035e-19f;

struct Tile {
  u32 pairs[8][4];  // [row][two columns, the first one low]
  int row, column;  // of the first value, within the tile
};

// As a Tile, in FP32: weights.
struct WideTile {
  float v[8][8];
  int row, column;
};

// Where a tile's layouts go; null pointers are layouts that nobody wants. `values` [R, C], `transposed` [C, P].
struct Out {
  u8* values;
  float* scales;  // [C / 128, scale_stride]
  u8* transposed;
  float* scales_transposed;  // [P / 128, scale_stride_transposed]
  int C, P, scale_stride, scale_stride_transposed;
};

struct Scratch {
  __align__(16) u8 bytes[TILE * TILE];
  __align__(16) u16 column_max[THREADS / 32][TILE];  // of BF16 magnitudes, which order as integers do
  __align__(16) float inverse[TILE];
};

// Lets the next kernel of the stream take places as this one's blocks end, and waits until the one before is done:
// nothing is read or written before this.
static __device__ __forceinline__ void begin() {
  asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
}

// most / 448 and 1 / scale as IEEE has them, without its cases: both lie far from FP32's ends.
static __device__ __forceinline__ float inverse_of(float scale) {
  float guess;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(guess) : "f"(scale));
  return fmaf(guess, fmaf(-scale, guess, 1.0f), guess);
}

static __device__ __forceinline__ float scale_of(float amax) {
  const float most = fmaxf(amax, FLOOR), guess = most * (1.0f / 448.0f);
  const float scale = fmaf(fmaf(-448.0f, guess, most), 1.0f / 448.0f, guess);
  return POWER_OF_TWO ? __uint_as_float((__float_as_uint(scale) + 0x7fffffu) & 0x7f800000u) : scale;
}

static __device__ __forceinline__ u32 fp8_pair(float low, float high) {
  u16 pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

static __device__ __forceinline__ uint2 fp8_eight(const float (&v)[8], float s) {
  return make_uint2(fp8_pair(v[0] * s, v[1] * s) | fp8_pair(v[2] * s, v[3] * s) << 16,
                    fp8_pair(v[4] * s, v[5] * s) | fp8_pair(v[6] * s, v[7] * s) << 16);
}

static __device__ __forceinline__ u32 bf16_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

static __device__ __forceinline__ float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
static __device__ __forceinline__ float high_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

static __device__ __forceinline__ uint4 bf16_eight(const float (&v)[8]) {
  return make_uint4(bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3]), bf16_pair(v[4], v[5]), bf16_pair(v[6], v[7]));
}

static __device__ __forceinline__ void unpack_bf16(float (&v)[8], uint4 raw) {
  const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = i % 2 ? high_bf16(words[i / 2]) : low_bf16(words[i / 2]);
}

template <int COUNT>
static __device__ __forceinline__ void unpack_fp8(float (&v)[COUNT], const u32 (&words)[COUNT / 4], float scale) {
#pragma unroll
  for (int i = 0; i < COUNT; i += 4) {
    asm("{\n.reg .b16 low, high, a, b, c, d;\n.reg .b32 ab, cd;\nmov.b32 {low, high}, %4;\n"
        "cvt.rn.f16x2.e4m3x2 ab, low;\ncvt.rn.f16x2.e4m3x2 cd, high;\nmov.b32 {a, b}, ab;\nmov.b32 {c, d}, cd;\n"
        "cvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\ncvt.f32.f16 %2, c;\ncvt.f32.f16 %3, d;\n}"
        : "=f"(v[i]), "=f"(v[i + 1]), "=f"(v[i + 2]), "=f"(v[i + 3])
        : "r"(words[i / 4]));
    v[i] *= scale, v[i + 1] *= scale, v[i + 2] *= scale, v[i + 3] *= scale;
  }
}

// Eight elements, or zeros where there are none.
static __device__ __forceinline__ uint4 load_eight(const u16* from, bool there) {
  return there ? __ldg((const uint4*)from) : make_uint4(0, 0, 0, 0);
}

static __device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// To shared memory, past the registers; zeros where there is nothing.
static __device__ __forceinline__ void fetch_sixteen(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}
static __device__ __forceinline__ void fetch_eight(void* to, const void* from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 8 : 0) : "memory");
}
static __device__ __forceinline__ void fetch_four(void* to, const void* from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 4 : 0) : "memory");
}
static __device__ __forceinline__ void fetched() { asm volatile("cp.async.wait_all;" ::: "memory"); }

template <class T>
static __device__ __forceinline__ T empty_tile() {
  T t;
  t.row = threadIdx.x / 16 * 8, t.column = threadIdx.x % 16 * 8;
  return t;
}

static __device__ __forceinline__ void set_row(Tile& t, int r, uint4 eight) {
  t.pairs[r][0] = eight.x, t.pairs[r][1] = eight.y, t.pairs[r][2] = eight.z, t.pairs[r][3] = eight.w;
}

static __device__ __forceinline__ uint4 row_of(const Tile& t, int r) {
  return make_uint4(t.pairs[r][0], t.pairs[r][1], t.pairs[r][2], t.pairs[r][3]);
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

// Of eight rows that 16 threads share: the sums over the threads, one row a pair of them: row (lane / 2) % 8.
static __device__ __forceinline__ float sums_over_rows(float (&of_row)[8]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 4; half; half /= 2) {
    const bool upper = lane & half * 2;
#pragma unroll
    for (int r = 0; r < half; r++) {
      const float give = upper ? of_row[r] : of_row[r + half], keep = upper ? of_row[r + half] : of_row[r];
      of_row[r] = keep + __shfl_xor_sync(~0u, give, half * 2);
    }
  }
  return of_row[0] + __shfl_xor_sync(~0u, of_row[0], 1);
}

// Two magnitudes of BF16 at once.
static __device__ __forceinline__ u32 most_of(u32 a, u32 b) {
  u32 most;
  asm("max.u16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  return most;
}

// The largest magnitudes of a thread's rows, two rows each, and of its columns, two columns each.
struct Most {
  u32 of_rows[4], of_columns[4];
};
static __device__ __forceinline__ Most most_of(const Tile& t) {
  Most most = {};
#pragma unroll
  for (int r = 0; r < 8; r += 2) {
    u32 both[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      u32 p[4];
#pragma unroll
      for (int c = 0; c < 4; c++) {
        p[c] = t.pairs[r + i][c] & 0x7fff7fffu;
        most.of_columns[c] = most_of(most.of_columns[c], p[c]);
      }
      both[i] = most_of(most_of(p[0], p[1]), most_of(p[2], p[3]));
    }
    most.of_rows[r / 2] = most_of(__byte_perm(both[0], both[1], 0x5410), __byte_perm(both[0], both[1], 0x7632));
  }
  return most;
}

// A scale that the thread worked out for all: that of row `row` of eight, which another thread may have, too.
struct RowScale {
  int row;
  bool first;  // of those that have it
  float scale, inverse;
  // For the work on row r.
  __device__ __forceinline__ float inverse_of_row(int r) const { return __shfl_sync(~0u, inverse, r / 2 * 4 + r % 2, 16); }
};

// From the largest magnitudes of eight rows, of which 16 neighbours have eight elements each.
static __device__ __forceinline__ RowScale scale_of_rows(const u32 (&most)[4]) {
  // Of the 16 threads that share the rows, four end with the same two of them, and two of these divide, one a row.
  const int lane = threadIdx.x % 32;
  u32 two[2], one;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const u32 give = lane & 8 ? most[i] : most[i + 2], keep = lane & 8 ? most[i + 2] : most[i];
    two[i] = most_of(keep, __shfl_xor_sync(~0u, give, 8));
  }
  one = most_of(lane & 4 ? two[1] : two[0], __shfl_xor_sync(~0u, lane & 4 ? two[0] : two[1], 4));
  one = most_of(one, __shfl_xor_sync(~0u, one, 2));
  one = most_of(one, __shfl_xor_sync(~0u, one, 1));
  const float scale = scale_of(lane % 2 ? high_bf16(one) : low_bf16(one));
  return {lane / 4 % 4 * 2 + lane % 2, lane % 4 < 2, scale, inverse_of(scale)};
}

// Every row of the tile with a scale of its own: 8 bytes a thread, 128 a row.
static __device__ __forceinline__ void write_rows(const Tile& t, const u32 (&most)[4], const Out& out, Place place,
                                                  int column_tile) {
  const RowScale mine = scale_of_rows(most);
  if (mine.first && t.row + mine.row < place.valid_rows) {
    out.scales[(long long)column_tile * out.scale_stride + place.first_row + t.row + mine.row] = mine.scale;
  }
  u8* to = out.values + (long long)(place.first_row + t.row) * out.C + column_tile * TILE + t.column;
  const int there = column_tile * TILE + t.column < out.C ? place.valid_rows - t.row : 0;
#pragma unroll
  for (int r = 0; r < 8; r++, to += out.C) {
    float v[8];
    unpack_bf16(v, row_of(t, r));
    const uint2 eight = fp8_eight(v, mine.inverse_of_row(r));
    if (r < there) *(uint2*)to = eight;
  }
}

// The transposed tile through shared memory. 16-byte pieces are permuted by the column's group of eight, and their halves
// by the group's upper bit: 16 threads meet 16 different pairs of banks.
static __device__ __forceinline__ float value(const WideTile& t, int r, int c) { return t.v[r][c]; }
static __device__ __forceinline__ float value(const Tile& t, int r, int c) {
  return c % 2 ? high_bf16(t.pairs[r][c / 2]) : low_bf16(t.pairs[r][c / 2]);
}
template <class T>
static __device__ __forceinline__ void write_transposed(const T& t, const float (&inverse)[8], Scratch& scratch, u8* to,
                                                        int valid_columns, int rows_to_write, long long P) {
#pragma unroll
  for (int c = 0; c < 8; c++) {
    float v[8];
#pragma unroll
    for (int r = 0; r < 8; r++) v[r] = value(t, r, c);
    const int group = t.column / 8, piece = t.row / 16 ^ (group & 7), half = (t.row / 8 ^ group / 8) & 1;
    *(uint2*)(scratch.bytes + (t.column + c) * TILE + piece * 16 + half * 8) = fp8_eight(v, inverse[c]);
  }
  __syncthreads();
#pragma unroll
  for (int pass = 0; pass < 4; pass++) {
    const int column = pass * 32 + threadIdx.x / 8, first = threadIdx.x % 8 * 16, group = column / 8;
    uint4 piece = *(const uint4*)(scratch.bytes + column * TILE + (first / 16 ^ (group & 7)) * 16);
    if (group / 8) piece = make_uint4(piece.z, piece.w, piece.x, piece.y);
    if (column < valid_columns && first < rows_to_write) *(uint4*)(to + column * P + first) = piece;
  }
}

// An activation: a scale for each row and one for each column of the tile. All threads of the block call this; rows and
// columns of the tile that do not exist hold zeros.
static __device__ __forceinline__ void emit(const Tile& t, const Out& out, Place place, int row_tile, int column_tile,
                                            Scratch& scratch) {
  const Most most = most_of(t);
  if (out.transposed) {
    u32 amax[4];
#pragma unroll
    for (int p = 0; p < 4; p++) amax[p] = most_of(most.of_columns[p], __shfl_xor_sync(~0u, most.of_columns[p], 16));
    if (threadIdx.x % 32 < 16) {
      *(uint4*)(scratch.column_max[threadIdx.x / 32] + t.column) = make_uint4(amax[0], amax[1], amax[2], amax[3]);
    }
  }
  if (out.values) write_rows(t, most.of_rows, out, place, column_tile);
  if (!out.transposed) return;
  __syncthreads();
  if (threadIdx.x < TILE) {
    u32 all = 0;
#pragma unroll
    for (int w = 0; w < THREADS / 32; w++) all = max(all, (u32)scratch.column_max[w][threadIdx.x]);
    const float scale = scale_of(low_bf16(all));
    scratch.inverse[threadIdx.x] = inverse_of(scale);
    const int column = column_tile * TILE + threadIdx.x;
    if (column < out.C) out.scales_transposed[(long long)row_tile * out.scale_stride_transposed + column] = scale;
  }
  __syncthreads();
  const float4 low = *(const float4*)(scratch.inverse + t.column), high = *(const float4*)(scratch.inverse + t.column + 4);
  const float inverse[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  u8* to = out.transposed + (long long)column_tile * TILE * out.P + row_tile * TILE;
  write_transposed(t, inverse, scratch, to, out.C - column_tile * TILE, TILE, out.P);
}

static __device__ __forceinline__ float most_in(const WideTile& t) {
  float amax = 0;
#pragma unroll
  for (int i = 0; i < 64; i++) amax = fmaxf(amax, fabsf(t.v[i / 8][i % 8]));
  return amax;
}
static __device__ __forceinline__ float most_in(const Tile& t) {
  u32 most = 0;
#pragma unroll
  for (int i = 0; i < 32; i++) most = most_of(most, t.pairs[i / 4][i % 4] & 0x7fff7fffu);
  return low_bf16(most_of(most, most >> 16));
}

// A weight: one scale for the whole tile, [R, C] and its transpose [C, R]; the scales are [R / 128, C / 128] and their
// transpose.
template <class T>
static __device__ __forceinline__ void emit_block(const T& t, const Out& out, int row_tile, int column_tile,
                                                  Scratch& scratch) {
  const int R = out.P, C = out.C, row_tiles = (R + TILE - 1) / TILE, column_tiles = (C + TILE - 1) / TILE;
  float amax = most_in(t);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, step));
  if (threadIdx.x % 32 == 0) scratch.inverse[threadIdx.x / 32] = amax;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < THREADS / 32; w++) amax = fmaxf(amax, scratch.inverse[w]);
  const float scale = scale_of(amax), inverse = inverse_of(scale);
  if (threadIdx.x == 0) {
    out.scales[row_tile * column_tiles + column_tile] = scale;
    out.scales_transposed[column_tile * row_tiles + row_tile] = scale;
  }
  const int column = column_tile * TILE + t.column, valid_rows = R - row_tile * TILE;
#pragma unroll
  for (int r = 0; r < 8; r++) {
    if (t.row + r >= valid_rows || column >= C) continue;
    float v[8];
#pragma unroll
    for (int c = 0; c < 8; c++) v[c] = value(t, r, c);
    *(uint2*)(out.values + (long long)(row_tile * TILE + t.row + r) * C + column) = fp8_eight(v, inverse);
  }
  const float all[8] = {inverse, inverse, inverse, inverse, inverse, inverse, inverse, inverse};
  u8* to = out.transposed + (long long)column_tile * TILE * R + row_tile * TILE;
  write_transposed(t, all, scratch, to, C - column_tile * TILE, valid_rows, R);
}
