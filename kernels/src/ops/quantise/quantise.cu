// FP8 with fine-grained scales from BF16 (activations) or FP32 too (weights): the tensor is read once, whatever is
// written. Follows tile.cuh.
//
// Defined from outside: INPUT_FP32 of weights (else BF16).

// x [R, C] → the layouts that are wanted. `counts` cuts the rows into experts.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    quantise(const u16* x, u8* values, float* scales, u8* transposed, float* scales_transposed,
             const int* counts, int num_experts, int R, int C, int P, int scale_stride, int scale_stride_transposed) {
  __shared__ Scratch scratch;
  begin();
  const Out out = {values, scales, transposed, scales_transposed, C, P, scale_stride, scale_stride_transposed};
  const int column_tile = blockIdx.x, row_tile = blockIdx.y;
  const Place place = find(counts, num_experts, R, row_tile);
  if (place.valid_rows <= 0) return;
  Tile t = empty_tile<Tile>();
  const int column = column_tile * TILE + t.column, there = column < C ? place.valid_rows - t.row : 0;
  const u16* from = x + (long long)(place.first_row + t.row) * C + column;
#pragma unroll
  for (int r = 0; r < 8; r++) set_row(t, r, load_eight(from + (long long)r * C, r < there));
  emit(t, out, place, row_tile, column_tile, scratch);
}

#if !INPUT_FP32
// x [T, C] → each row's values [S, C] and scales [S, tiles of C] at its places sent_row [T, P] (−1: nowhere), P at most 64.
// A block a row; 16 threads have a 1×128 tile.
extern "C" __global__ void __launch_bounds__(THREADS)
    pack(const u16* x, const int* sent_row, u8* values, float* scales, int C, int P) {
  __shared__ int places[64], num_places;
  begin();
  const int row = blockIdx.x, lane = threadIdx.x % 32, tiles = (C + TILE - 1) / TILE;
  if (threadIdx.x < 32) {
    int found = 0;
    for (int first = 0; first < P; first += 32) {
      const int place = first + lane < P ? __ldg(sent_row + (long long)row * P + first + lane) : -1;
      const u32 there = __ballot_sync(~0u, place >= 0);
      if (place >= 0) places[found + __popc(there & ((1u << lane) - 1))] = place;
      found += __popc(there);
    }
    if (lane == 0) num_places = found;
  }
  __syncthreads();
  const u32 sixteen = 0xffffu << (lane & 16);
  for (int eight = threadIdx.x; eight < tiles * 16; eight += THREADS) {
    const int column = eight * 8;
    const uint4 raw = load_eight(x + (long long)row * C + column, column < C);
    u32 most = most_of(most_of(raw.x & 0x7fff7fffu, raw.y & 0x7fff7fffu), most_of(raw.z & 0x7fff7fffu, raw.w & 0x7fff7fffu));
#pragma unroll
    for (int step = 1; step < 16; step *= 2) most = most_of(most, __shfl_xor_sync(sixteen, most, step));
    const float scale = scale_of(high_bf16(most_of(most, most << 16)));
    float v[8];
    unpack_bf16(v, raw);
    const uint2 packed = fp8_eight(v, inverse_of(scale));
    for (int i = 0; i < num_places; i++) {
      if (column < C) *(uint2*)(values + (long long)places[i] * C + column) = packed;
      if (lane % 16 == 0) scales[(long long)places[i] * tiles + eight / 16] = scale;
    }
  }
}
#endif

// Of two pairs of BF16, the larger magnitudes; their signs are anyone's.
static __device__ __forceinline__ u32 larger_of(u32 a, u32 b) {
  u32 larger;
  asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

// 16 rows of four columns, TILE bytes from one row to the next, as part of the eight groups of rows that eight neighbours in the
// warp hold → 16 bytes of each column. The neighbours write 128 bytes of one column: the eight lanes that a multiprocessor sends off
// at once fill a line of L2.
static __device__ __forceinline__ void transpose_part(const u8* from, const float* of_row, u8* to, long long P, float* scales) {
  u32 pairs[16][2], most[2] = {0, 0};
#pragma unroll
  for (int r = 0; r < 16; r++) {
    float v[4];
    unpack_fp8(v, {*(const u32*)(from + r * TILE)}, of_row[r]);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      pairs[r][i] = bf16_pair(v[2 * i], v[2 * i + 1]);
      most[i] = larger_of(most[i], pairs[r][i]);
    }
  }
#pragma unroll
  for (int lane = 1; lane < 8; lane *= 2) {
#pragma unroll
    for (int i = 0; i < 2; i++) most[i] = larger_of(most[i], __shfl_xor_sync(~0u, most[i], lane));
  }
  auto half_of = [](u32 pair, int c) { return c % 2 ? high_bf16(pair) : low_bf16(pair); };
  // The eight groups need the same four scales: each works out one.
  const int lane = threadIdx.x % 8, mine = lane % 4;
  const float scale = scale_of(fabsf(half_of(mine / 2 ? most[1] : most[0], mine))), of_column = inverse_of(scale);
  if (lane < 4) scales[mine] = scale;
#pragma unroll
  for (int c = 0; c < 4; c++) {
    const float inverse = __shfl_sync(~0u, of_column, c, 8);
    u32 packed[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float v[4];
#pragma unroll
      for (int r = 0; r < 4; r++) v[r] = half_of(pairs[4 * i + r][c / 2], c) * inverse;
      packed[i] = fp8_pair(v[0], v[1]) | fp8_pair(v[2], v[3]) << 16;
    }
    *(uint4*)(to + c * P) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
  }
}

#if POWER_OF_TWO
// A warp's rows' factors: 16 of a group, and four words that keep the groups' banks apart.
constexpr int FACTORS = TILE / 16 * 20;

static __device__ __forceinline__ u32 larger_half_of(u32 a, u32 b) {
  u32 larger;
  asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

static __device__ __forceinline__ u32 times(u32 a, u32 b) {
  u32 product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

// A power of two between 2^-14 and 2^15, given as FP32's bits of 2^a and 2^b, in FP16: 2^(a - b).
static __device__ __forceinline__ u32 ratio_of(u32 a, u32 b) { return (a - b + (15u << 23)) >> 13; }

// As transpose_part, in fewer instructions: where all scales are powers of two and near each other, FP16 holds every
// product that E4M3 does not round to nothing. True if so; else nothing is written. `factors` is the warp's own.
static __device__ __forceinline__ bool transpose_in_half(const u8* from, const float* of_row, int group, u32* factors, u8* to,
                                                         long long P, float* scales) {
  const int lane = threadIdx.x % 32, mine = group % 4;
  const uint4 four = *(const uint4*)(of_row + lane * 4);
  const u32 bits[4] = {four.x, four.y, four.z, four.w};
  // A row that is not there has scale 0, which is the largest number less one.
  const u32 most_bits = __reduce_max_sync(~0u, max(max(bits[0], bits[1]), max(bits[2], bits[3])));
  const u32 least = __reduce_min_sync(~0u, min(min(bits[0] - 1, bits[1] - 1), min(bits[2] - 1, bits[3] - 1))) + 1;
  const bool powers = !((bits[0] | bits[1] | bits[2] | bits[3]) & 0x007fffffu);
  if (!__all_sync(~0u, powers) || most_bits - least > 14u << 23) return false;
  u32 factor[4];
#pragma unroll
  for (int i = 0; i < 4; i++) factor[i] = bits[i] ? ratio_of(bits[i], most_bits) * 0x10001u : 0;
  __syncwarp();
  *(uint4*)(factors + lane / 4 * 20 + lane % 4 * 4) = make_uint4(factor[0], factor[1], factor[2], factor[3]);
  __syncwarp();
  u32 pairs[16][2], most[2];
#pragma unroll
  for (int r = 0; r < 16; r++) {
    u32 both[2];
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.rn.f16x2.e4m3x2 %0, low;\ncvt.rn.f16x2.e4m3x2 %1, high;\n}"
        : "=r"(both[0]), "=r"(both[1]) : "r"(*(const u32*)(from + r * TILE)));
#pragma unroll
    for (int i = 0; i < 2; i++) {
      pairs[r][i] = times(both[i], factors[group * 20 + r]);
      most[i] = r ? larger_half_of(most[i], pairs[r][i]) : pairs[r][i];
    }
  }
#pragma unroll
  for (int step = 1; step < 8; step *= 2) {
#pragma unroll
    for (int i = 0; i < 2; i++) most[i] = larger_half_of(most[i], __shfl_xor_sync(~0u, most[i], step));
  }
  float amax;
  asm("cvt.f32.f16 %0, %1;" : "=f"(amax) : "h"((u16)((mine / 2 ? most[1] : most[0]) >> mine % 2 * 16 & 0x7fffu)));
  const float scale = scale_of(amax * __uint_as_float(most_bits));
  const u32 by = most_bits - __float_as_uint(scale);
  // The largest is at most 448 times the largest scale, so `by` is no division.
  if (!__all_sync(~0u, amax == 0 || by <= 15u << 23)) return false;
  if (threadIdx.x % 8 < 4) scales[mine] = scale;
  const u32 ratio = amax == 0 ? 0 : ratio_of(most_bits, __float_as_uint(scale));
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const u32 ratios = __byte_perm(__shfl_sync(~0u, ratio, 2 * i, 8), __shfl_sync(~0u, ratio, 2 * i + 1, 8), 0x5410);
    u32 even[4], odd[4];
#pragma unroll
    for (int r = 0; r < 16; r += 4) {
      u32 two[2];
#pragma unroll
      for (int k = 0; k < 2; k++) {
        asm("{\n.reg .b16 first, second;\ncvt.rn.satfinite.e4m3x2.f16x2 first, %1;\ncvt.rn.satfinite.e4m3x2.f16x2 second, %2;\n"
            "mov.b32 %0, {first, second};\n}"
            : "=r"(two[k]) : "r"(times(pairs[r + 2 * k][i], ratios)), "r"(times(pairs[r + 2 * k + 1][i], ratios)));
      }
      even[r / 4] = __byte_perm(two[0], two[1], 0x6420), odd[r / 4] = __byte_perm(two[0], two[1], 0x7531);
    }
    *(uint4*)(to + 2 * i * P) = make_uint4(even[0], even[1], even[2], even[3]);
    *(uint4*)(to + (2 * i + 1) * P) = make_uint4(odd[0], odd[1], odd[2], odd[3]);
  }
  return true;
}
#endif

// Rows in FP8 (values [., C], a scale for each 1×128 tile) → the transposed layout of R of them, rounded to BF16 on the way.
// `source` [R]: row r of the output is row source[r] (null: row r itself). Row tiles run fastest: what several rows of the
// output read is the same few columns at a time, and stays in L2. A block takes every gridDim.y-th column tile; the next one
// is on its way to shared memory while this one is worked on: a thread fetches 16 bytes of each of four rows, and transposes
// 16 rows of four columns, so that a warp has all rows of its 16 columns.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    transpose(const u8* from, const float* from_scales, int from_stride, const int* source, u8* transposed,
              float* scales_transposed, const int* counts, int num_experts, int R, int C, int P, int scale_stride_transposed) {
  __shared__ __align__(16) u8 raw[2][TILE * TILE];
  __shared__ __align__(16) float of_row[2][TILE];
  __shared__ int rows[TILE];  // where they lie; -1: nowhere
#if POWER_OF_TWO
  __shared__ __align__(16) u32 factors[THREADS / 32][FACTORS];
#endif
  begin();
  const int row_tile = blockIdx.x;
  const Place place = find(counts, num_experts, R, row_tile);
  if (place.valid_rows <= 0) return;
  if (threadIdx.x < TILE) {
    const int row = place.first_row + threadIdx.x;
    rows[threadIdx.x] = threadIdx.x >= place.valid_rows ? -1 : source ? __ldg(source + row) : row;
  }
  __syncthreads();
  auto fetch = [&](int column_tile, int half) {
    if (column_tile * TILE >= C) return;
    const int piece = threadIdx.x % 8, column = column_tile * TILE + piece * 16;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int to = threadIdx.x / 8 + 32 * i, row = rows[to];
      const bool there = row >= 0 && column < C;
      // Pieces of 16 bytes are permuted by the group of 16 rows: a warp that reads a word of each group meets all banks.
      fetch_sixteen(raw[half] + to * TILE + (piece ^ to / 16) * 16, from + (there ? (long long)row * C + column : 0), there);
    }
    if (threadIdx.x >= TILE) return;
    const int row = rows[threadIdx.x];
    fetch_four(of_row[half] + threadIdx.x, from_scales + (long long)column_tile * from_stride + max(row, 0), row >= 0);
  };
  const int warp = threadIdx.x / 32, group = threadIdx.x % 8, quad = threadIdx.x % 32 / 8;
  int half = 0;
  fetch(blockIdx.y, half);
#pragma unroll 1
  for (int column_tile = blockIdx.y; column_tile * TILE < C; column_tile += gridDim.y, half ^= 1) {
    fetched();
    __syncthreads();
    fetch(column_tile + gridDim.y, half ^ 1);
    const int column = column_tile * TILE + warp * 16 + quad * 4;
    if (column >= C) continue;  // so is the whole warp's part
    u8* to = transposed + (long long)column * P + row_tile * TILE + group * 16;
    float* scales = scales_transposed + (long long)row_tile * scale_stride_transposed + column;
    const u8* part = raw[half] + group * 16 * TILE + (warp ^ group) * 16 + quad * 4;
#if POWER_OF_TWO
    if (transpose_in_half(part, of_row[half], group, factors[warp], to, P, scales)) continue;
#endif
    transpose_part(part, of_row[half] + group * 16, to, P, scales);
  }
}

// To E5M6: six bits of fraction, ties to even, at most 65024, steps of 2⁻²⁰ below 2⁻¹⁴.
static __device__ __forceinline__ float e5m6(float x) {
  x = fminf(fmaxf(x, -65024.0f), 65024.0f);
  const u32 bits = __float_as_uint(x);
  const float normal = __uint_as_float((bits + (bits >> 17 & 1) + 0xffffu) & ~0x1ffffu);
  return fabsf(x) < 0x1p-14f ? rintf(x * 0x1p20f) * 0x1p-20f : normal;
}

// BF16 → BF16, count a multiple of 8.
extern "C" __global__ void __launch_bounds__(THREADS) round_e5m6(const u16* x, u16* y, int eights) {
  begin();
  const long long at = ((long long)blockIdx.x * THREADS + threadIdx.x) * 8;
  if (at / 8 >= eights) return;
  float v[8];
  unpack_bf16(v, __ldcs((const uint4*)(x + at)));
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = e5m6(v[i]);
  *(uint4*)(y + at) = bf16_eight(v);
}

// x [matrices, R, C] → blocks of it, and of its transpose.
extern "C" __global__ void __launch_bounds__(THREADS, INPUT_FP32 ? 2 : 3)
    quantise_weights(const void* x, u8* values, float* scales, u8* transposed, float* scales_transposed, int R, int C) {
  __shared__ Scratch scratch;
  begin();
  const int row_tiles = (R + TILE - 1) / TILE, column_tiles = (C + TILE - 1) / TILE;
  const int column_tile = blockIdx.x % column_tiles, tile_row = blockIdx.x / column_tiles;
  const int row_tile = tile_row % row_tiles, matrix = tile_row / row_tiles;
  const long long first = (long long)matrix * R * C, first_scale = (long long)matrix * row_tiles * column_tiles;
  const Out out = {values + first, scales + first_scale, transposed + first, scales_transposed + first_scale, C, R, 0, 0};
#if INPUT_FP32
  WideTile t = empty_tile<WideTile>();
#else
  Tile t = empty_tile<Tile>();
#endif
  const int row = row_tile * TILE + t.row, column = column_tile * TILE + t.column;
#pragma unroll
  for (int r = 0; r < 8; r++) {
    const long long at = first + (long long)(row + r) * C + column;
    const bool there = column < C && row + r < R;
#if INPUT_FP32
    const float4* from = (const float4*)((const float*)x + at);
    const float4 none = make_float4(0, 0, 0, 0), low = there ? __ldcs(from) : none, high = there ? __ldcs(from + 1) : none;
    t.v[r][0] = low.x, t.v[r][1] = low.y, t.v[r][2] = low.z, t.v[r][3] = low.w;
    t.v[r][4] = high.x, t.v[r][5] = high.y, t.v[r][6] = high.z, t.v[r][7] = high.w;
#else
    set_row(t, r, load_eight((const u16*)x + at, there));
#endif
  }
  emit_block(t, out, row_tile, column_tile, scratch);
}
