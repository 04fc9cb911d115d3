// y = weight · x · rstd straight into FP8 (and BF16), and the statistics rstd = 1 / sqrt(mean(x²) + eps) that it needs,
// which fall out of the residual sum before it. Follows tile.cuh.
//
// Defined from outside: WEIGHT_FP32 (else BF16).
constexpr int ROW_THREADS = 128;

// One block a row: sum = x + y in BF16 (y and sum may be null: then only x's statistics), rstd of the row as rounded.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    statistics(const u16* x, const u16* y, u16* sum, float* rstd, float eps, int C) {
  const long long row = (long long)blockIdx.x * C;
  float squares = 0;
#pragma unroll 4
  for (int at = threadIdx.x * 8; at < C; at += ROW_THREADS * 8) {
    float v[8];
    unpack_bf16(v, __ldg((const uint4*)(x + row + at)));
    if (y) {
      float w[8];
      unpack_bf16(w, __ldg((const uint4*)(y + row + at)));
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] += w[i];
      const uint4 rounded = bf16_eight(v);
      *(uint4*)(sum + row + at) = rounded;
      unpack_bf16(v, rounded);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) squares += v[i] * v[i];
  }
#pragma unroll
  for (int step = 16; step; step /= 2) squares += __shfl_xor_sync(~0u, squares, step);
  __shared__ float of_warp[ROW_THREADS / 32];
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = squares;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < ROW_THREADS / 32; w++) squares += of_warp[w];
    rstd[blockIdx.x] = 1.0f / sqrtf(squares / C + eps);
  }
}

// x, y [R, C], rstd [R]; y may be null.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    rms_norm(const u16* x, const float* rstd, const void* weight, u16* y, u8* values, float* scales, u8* transposed,
             float* scales_transposed, int R, int C, int P, int scale_stride, int scale_stride_transposed) {
  __shared__ Scratch scratch;
  const Out out = {values, scales, transposed, scales_transposed, C, P, scale_stride, scale_stride_transposed};
  const int column_tile = blockIdx.x, row_tile = blockIdx.y;
  const Place place = {row_tile * TILE, min(TILE, R - row_tile * TILE)};
  Tile t = empty_tile<Tile>();
  const int column = column_tile * TILE + t.column, there = column < C ? place.valid_rows - t.row : 0;
  const long long first = (long long)(place.first_row + t.row) * C + column;
  float of_row[8], w[8] = {};
#pragma unroll
  for (int r = 0; r < 8; r++) {
    set_row(t, r, load_eight(x + first + (long long)r * C, r < there));
    of_row[r] = r < there ? __ldg(rstd + place.first_row + t.row + r) : 0;
  }
  if (WEIGHT_FP32) {
#pragma unroll
    for (int c = 0; c < 8; c++) w[c] = column < C ? __ldg((const float*)weight + column + c) : 0;
  } else {
    unpack_bf16(w, load_eight((const u16*)weight + column, column < C));
  }
#pragma unroll
  for (int r = 0; r < 8; r++) {
    float v[8];
#pragma unroll
    for (int c = 0; c < 8; c++) v[c] = value(t, r, c) * of_row[r] * w[c];
    set_row(t, r, bf16_eight(v));
    if (y && r < there) *(uint4*)(y + first + (long long)r * C) = bf16_eight(v);
  }
  emit(t, out, place, row_tile, column_tile, scratch);
}
