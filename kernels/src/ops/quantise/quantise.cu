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

// Rows in FP8 (values [., C], a scale for each 1×128 tile) → the transposed layout of R of them, rounded to BF16 on the way.
// `source` [R]: row r of the output is row source[r] (null: row r itself); rows that several read stay in L2.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    transpose(const u8* from, const float* from_scales, int from_stride, const int* source, u8* transposed,
              float* scales_transposed, const int* counts, int num_experts, int R, int C, int P, int scale_stride,
              int scale_stride_transposed) {
  __shared__ Scratch scratch;
  begin();
  const Out out = {nullptr, nullptr, transposed, scales_transposed, C, P, scale_stride, scale_stride_transposed};
  const int row_tile = blockIdx.y;
  const Place place = find(counts, num_experts, R, row_tile);
  if (place.valid_rows <= 0) return;
  Tile t = empty_tile<Tile>();
  const int first = place.first_row + t.row;
  int rows[8];
#pragma unroll
  for (int r = 0; r < 8; r++) rows[r] = t.row + r < place.valid_rows ? (source ? __ldg(source + first + r) : first + r) : -1;
  // Where the rows lie is known by now: it serves several tiles.
#pragma unroll 1
  for (int column_tile = blockIdx.x; column_tile * TILE < C; column_tile += gridDim.x) {
    const int column = column_tile * TILE + t.column;
    uint2 raw[8];
    float scale[8];
#pragma unroll
    for (int r = 0; r < 8; r++) {
      const bool there = rows[r] >= 0 && column < C;
      const uint2* at = (const uint2*)(from + (long long)rows[r] * C + column);
      raw[r] = there ? (source ? __ldg(at) : __ldcs(at)) : make_uint2(0, 0);
      scale[r] = there ? __ldg(from_scales + (long long)column_tile * from_stride + rows[r]) : 0;
    }
#pragma unroll
    for (int r = 0; r < 8; r++) {
      float v[8];
      unpack_fp8(v, raw[r], scale[r]);
      set_row(t, r, bf16_eight(v));
    }
    emit(t, out, place, row_tile, column_tile, scratch);
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
extern "C" __global__ void __launch_bounds__(THREADS) round_e5m6(const u16* x, u16* y, int count) {
  begin();
  const long long at = ((long long)blockIdx.x * THREADS + threadIdx.x) * 8;
  if (at >= count) return;
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
  const int column_tile = blockIdx.x, row_tile = blockIdx.y % row_tiles, matrix = blockIdx.y / row_tiles;
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
