// y = weight · x · rstd straight into FP8 (and BF16), and the statistics rstd = 1 / sqrt(mean(x²) + eps) that it needs,
// which fall out of the residual sum before it. Follows tile.cuh.
//
// Defined from outside: WEIGHT_FP32 (else BF16), PIECES (backward: eights of a row that a thread holds, PIECES · 4096 ≥ C).
constexpr int ROW_THREADS = 128, BACKWARD_THREADS = 512;

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

static __device__ __forceinline__ void load_weight(float (&w)[8], const void* weight, int at, bool there) {
  if (WEIGHT_FP32) {
#pragma unroll
    for (int c = 0; c < 8; c++) w[c] = there ? __ldg((const float*)weight + at + c) : 0;
  } else {
    unpack_bf16(w, load_eight((const u16*)weight + at, there));
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
  load_weight(w, weight, column, column < C);
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

// dy, x, add, dx [R, C]; rstd [R]; dweights [blocks, C], each block's part of d(weight). dx = add + the norm's own, where
// add, the gradient of the residual path, may be null. Persistent blocks, a row at a time.
extern "C" __global__ void __launch_bounds__(BACKWARD_THREADS, 1)
    backward(const u16* dy, const u16* x, const float* rstd, const void* weight, const u16* add, u16* dx, float* dweights,
             int R, int C) {
  __shared__ float of_warp[2][BACKWARD_THREADS / 32];
  float dweight[PIECES][8] = {};
  uint4 next_dy[PIECES], next_x[PIECES];
  auto load = [&](int row) {
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
      const int at = (p * BACKWARD_THREADS + threadIdx.x) * 8;
      const bool there = at < C && row < R;
      next_dy[p] = load_eight(dy + (long long)row * C + at, there), next_x[p] = load_eight(x + (long long)row * C + at, there);
    }
  };
  load(blockIdx.x);
  int turn = 0;
  for (int row = blockIdx.x; row < R; row += gridDim.x, turn ^= 1) {
    uint4 my_dy[PIECES], my_x[PIECES];
    const float scale = __ldg(rstd + row);
    float projection = 0;
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
      my_dy[p] = next_dy[p], my_x[p] = next_x[p];
      const int at = (p * BACKWARD_THREADS + threadIdx.x) * 8;
      float g[8], v[8], w[8];
      unpack_bf16(g, my_dy[p]), unpack_bf16(v, my_x[p]), load_weight(w, weight, at, at < C);
#pragma unroll
      for (int c = 0; c < 8; c++) {
        const float product = g[c] * v[c] * scale;
        dweight[p][c] += product, projection += product * w[c];
      }
    }
    load(row + gridDim.x);
#pragma unroll
    for (int step = 16; step; step /= 2) projection += __shfl_xor_sync(~0u, projection, step);
    if (threadIdx.x % 32 == 0) of_warp[turn][threadIdx.x / 32] = projection;
    __syncthreads();  // the other turn's sums may still be read: there are two places
    projection = 0;
#pragma unroll
    for (int w = 0; w < BACKWARD_THREADS / 32; w++) projection += of_warp[turn][w];
    projection /= C;
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
      const int at = (p * BACKWARD_THREADS + threadIdx.x) * 8;
      if (at >= C) continue;
      const long long place = (long long)row * C + at;
      float g[8], v[8], w[8], sum[8] = {};
      if (add) unpack_bf16(sum, __ldg((const uint4*)(add + place)));
      unpack_bf16(g, my_dy[p]), unpack_bf16(v, my_x[p]), load_weight(w, weight, at, true);
#pragma unroll
      for (int c = 0; c < 8; c++) sum[c] += (g[c] * w[c] - v[c] * scale * projection) * scale;
      *(uint4*)(dx + place) = bf16_eight(sum);
    }
  }
#pragma unroll
  for (int p = 0; p < PIECES; p++) {
    const int at = (p * BACKWARD_THREADS + threadIdx.x) * 8;
    if (at >= C) continue;
    float4* to = (float4*)(dweights + (long long)blockIdx.x * C + at);
    to[0] = make_float4(dweight[p][0], dweight[p][1], dweight[p][2], dweight[p][3]);
    to[1] = make_float4(dweight[p][4], dweight[p][5], dweight[p][6], dweight[p][7]);
  }
}
