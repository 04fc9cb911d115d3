// FP8 with fine-grained scales from BF16 (activations) or FP32 too (weights): the tensor is read once, whatever is
// written. Follows tile.cuh.
//
// Defined from outside: INPUT_FP32 of weights (else BF16).

// x [., C] → `out` for R rows. `source` [R]: row r of the output is row source[r] of x (a negative one is a row of
// zeros); null: row r itself. `counts` cuts the rows into experts.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    quantise(const u16* x, const int* source, u8* values, float* scales, u8* transposed, float* scales_transposed,
             const int* counts, int num_experts, int R, int C, int P, int scale_stride, int scale_stride_transposed) {
  __shared__ Scratch scratch;
  const Out out = {values, scales, transposed, scales_transposed, C, P, scale_stride, scale_stride_transposed};
  // Gathered rows are read several times: neighbours in time share the columns, so that these stay in L2.
  const int column_tile = source ? blockIdx.y : blockIdx.x, row_tile = source ? blockIdx.x : blockIdx.y;
  const Place place = find(counts, num_experts, R, row_tile);
  if (place.valid_rows <= 0) return;
  Tile t = empty_tile<Tile>();
  const int column = column_tile * TILE + t.column;
  int rows[8];
#pragma unroll
  for (int r = 0; r < 8; r++) {
    rows[r] = t.row + r < place.valid_rows && column < C ? place.first_row + t.row + r : -1;
    if (source && rows[r] >= 0) rows[r] = __ldg(source + rows[r]);
  }
#pragma unroll
  for (int r = 0; r < 8; r++) set_row(t, r, load_eight(x + (long long)rows[r] * C + column, rows[r] >= 0));
  emit(t, out, place, row_tile, column_tile, scratch);
}

static __device__ __forceinline__ void load(float (&v)[8], const void* x, long long at, bool there) {
  if (INPUT_FP32) {
    const float4* from = (const float4*)((const float*)x + at);
    const float4 none = make_float4(0, 0, 0, 0), low = there ? __ldcs(from) : none, high = there ? __ldcs(from + 1) : none;
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w, v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
  } else {
    unpack_bf16(v, load_eight((const u16*)x + at, there));
  }
}

// x [matrices, R, C] → blocks of it, and of its transpose.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    quantise_weights(const void* x, u8* values, float* scales, u8* transposed, float* scales_transposed, int R, int C) {
  __shared__ Scratch scratch;
  const int row_tiles = (R + TILE - 1) / TILE, column_tiles = (C + TILE - 1) / TILE;
  const int column_tile = blockIdx.x, row_tile = blockIdx.y % row_tiles, matrix = blockIdx.y / row_tiles;
  const long long first = (long long)matrix * R * C, first_scale = (long long)matrix * row_tiles * column_tiles;
  const Out out = {values + first, scales + first_scale, transposed + first, scales_transposed + first_scale, C, R, 0, 0};
  WideTile t = empty_tile<WideTile>();
  const int row = row_tile * TILE + t.row, column = column_tile * TILE + t.column;
#pragma unroll
  for (int r = 0; r < 8; r++) load(t.v[r], x, first + (long long)(row + r) * C + column, column < C && row + r < R);
  emit_block(t, out, row_tile, column_tile, scratch);
}
