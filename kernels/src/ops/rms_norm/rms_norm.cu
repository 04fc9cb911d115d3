// y = weight · x · rstd straight into FP8 (and BF16), and the statistics rstd = 1 / sqrt(mean(x²) + eps) that it needs,
// which fall out of the residual sum before it. Follows tile.cuh.
//
// Defined from outside, for backward: ROW, the threads of a row, 8 · ROW ≥ C, and ROWS at a time.

// Eights of a row that a thread of its statistics holds at most, and threads of a block at most.
constexpr int HELD = 8, MOST_THREADS = 512;  // HELD: as many as a Tile has rows

// A row to `threads` threads, which are whole warps: sum = x + y in BF16 (null: x is the sum), rstd of the row as rounded,
// and, where there is a weight and no y, x normed by it: in BF16, or in FP8 with a scale for each 1×128 tile. All is on its
// way at once, and read once.
extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    by_rows(const u16* x, const u16* y, u16* sum, const u16* weight, u16* normed, u8* values, float* scales, float* rstd,
            float eps, int R, int C, int scale_stride, int threads) {
  __shared__ float of_warp[MOST_THREADS / 32];
  const int group = threadIdx.x / threads, at = (threadIdx.x - group * threads) * 8, step = threads * 8;
  const int row = blockIdx.x * (blockDim.x / threads) + group;
  if (row >= R) return;  // all of a group, which has a barrier of its own
  const long long first = (long long)row * C + at;
  begin();
  uint4 held[HELD], more[HELD];
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const bool there = at + i * step < C;
    held[i] = load_eight(x + first + i * step, there);
    more[i] = load_eight((y ? y : weight) + (y ? first : at) + i * step, there && (y || weight));
  }
  float squares = 0;
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    float v[8], w[8];
    unpack_bf16(v, held[i]), unpack_bf16(w, more[i]);
    if (y) {
#pragma unroll
      for (int c = 0; c < 8; c++) v[c] += w[c];
      held[i] = bf16_eight(v);
      if (at + i * step < C) *(uint4*)(sum + first + i * step) = held[i];
    }
    unpack_bf16(v, held[i]);
#pragma unroll
    for (int c = 0; c < 8; c++) squares += v[c] * v[c];
  }
#pragma unroll
  for (int lane = 16; lane; lane /= 2) squares += __shfl_xor_sync(~0u, squares, lane);
  if (threads > 32) {
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = squares;
    asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "r"(threads) : "memory");
    squares = 0;
    for (int w = 0; w < threads / 32; w++) squares += of_warp[group * (threads / 32) + w];
  }
  const float scale = 1.0f / sqrtf(squares / C + eps);
  if (at == 0) rstd[row] = scale;
  if (!weight) return;
  Tile t;  // whose rows are pieces of this one, `step` apart
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    float v[8], w[8];
    unpack_bf16(v, held[i]), unpack_bf16(w, more[i]);
#pragma unroll
    for (int c = 0; c < 8; c++) v[c] = v[c] * scale * w[c];
    set_row(t, i, bf16_eight(v));
    if (normed && at + i * step < C) *(uint4*)(normed + first + i * step) = row_of(t, i);
  }
  if (!values) return;
  const RowScale mine = scale_of_rows(most_of(t).of_rows);
  const int tile = at / TILE + mine.row * step / TILE;  // the thread's own columns may lie behind the last of the tile's
  if (mine.first && tile * TILE < C) scales[(long long)tile * scale_stride + row] = mine.scale;
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    float v[8];
    unpack_bf16(v, row_of(t, i));
    const uint2 eight = fp8_eight(v, mine.inverse_of_row(i));
    if (at + i * step < C) *(uint2*)(values + first + i * step) = eight;
  }
}

// x, y [R, C], rstd [R]; y may be null.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    rms_norm(const u16* x, const float* rstd, const u16* weight, u16* y, u8* values, float* scales, u8* transposed,
             float* scales_transposed, int R, int C, int P, int scale_stride, int scale_stride_transposed) {
  __shared__ Scratch scratch;
  begin();
  const Out out = {values, scales, transposed, scales_transposed, C, P, scale_stride, scale_stride_transposed};
  // From the last rows to the first: what the pass before, over the same rows, has read last is still in L2.
  const int column_tile = blockIdx.x, row_tile = (R - 1) / TILE - blockIdx.y;
  const Place place = {row_tile * TILE, min(TILE, R - row_tile * TILE)};
  Tile t = empty_tile<Tile>();
  const int column = column_tile * TILE + t.column, there = column < C ? place.valid_rows - t.row : 0;
  const long long first = (long long)(place.first_row + t.row) * C + column;
  float of_row[8], w[8];
#pragma unroll
  for (int r = 0; r < 8; r++) {
    set_row(t, r, load_eight(x + first + (long long)r * C, r < there));
    of_row[r] = r < there ? __ldg(rstd + place.first_row + t.row + r) : 0;
  }
  unpack_bf16(w, load_eight(weight + column, column < C));
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
// add, the gradient of the residual path, may be null. Persistent blocks of ROWS groups of ROW threads, a row for each
// group at a time, eight columns for each thread; the next rows are on their way while these are worked on.
extern "C" __global__ void __launch_bounds__(ROWS* ROW, 1)
    backward(const u16* dy, const u16* x, const float* rstd, const u16* weight, const u16* add, u16* dx, float* dweights,
             int R, int C) {
  constexpr int WARPS = ROW / 32;
  __shared__ float of_warp[2][ROWS * WARPS];
  __shared__ float of_row[ROWS > 1 ? ROWS : 1][ROWS > 1 ? ROW * 8 : 1];
  const int group = threadIdx.x / ROW, at = threadIdx.x % ROW * 8, step = gridDim.x * ROWS;
  const bool here = at < C;
  float dweight[8] = {}, w[8];
  begin();
  unpack_bf16(w, load_eight(weight + at, here));
  uint4 next_dy, next_x, next_add;
  float next_scale;
  auto load = [&](int row) {
    const bool there = here && row < R;
    const long long place = (long long)row * C + at;
    next_dy = load_eight(dy + place, there), next_x = load_eight(x + place, there);
    next_add = load_eight(add + place, there && add);
    next_scale = row < R ? __ldg(rstd + row) : 0;
  };
  int row = blockIdx.x * ROWS + group, turn = 0;
  load(row);
  for (; row < R; row += step, turn ^= 1) {
    const uint4 my_dy = next_dy, my_x = next_x, my_add = next_add;
    const float scale = next_scale;
    load(row + step);
    float g[8], v[8], sum[8], projection = 0;
    unpack_bf16(g, my_dy), unpack_bf16(v, my_x);
#pragma unroll
    for (int c = 0; c < 8; c++) {
      const float product = g[c] * v[c] * scale;
      dweight[c] += product, projection += product * w[c];
    }
#pragma unroll
    for (int lane = 16; lane; lane /= 2) projection += __shfl_xor_sync(~0u, projection, lane);
    if (threadIdx.x % 32 == 0) of_warp[turn][threadIdx.x / 32] = projection;
    // The group's own barrier. The other turn's sums may still be read: there are two places.
    asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(ROW) : "memory");
    projection = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) projection += of_warp[turn][group * WARPS + i];
    projection *= scale / C;
    unpack_bf16(sum, my_add);
#pragma unroll
    for (int c = 0; c < 8; c++) sum[c] += (g[c] * w[c] - v[c] * projection) * scale;
    if (here) *(uint4*)(dx + (long long)row * C + at) = bf16_eight(sum);
  }
  if (ROWS > 1) {
#pragma unroll
    for (int c = 0; c < 8; c++) of_row[group][at + c] = dweight[c];
    __syncthreads();
    if (group > 0) return;
    for (int i = 1; i < ROWS; i++) {
#pragma unroll
      for (int c = 0; c < 8; c++) dweight[c] += of_row[i][at + c];
    }
  }
  if (!here) return;
  float4* to = (float4*)(dweights + (long long)blockIdx.x * C + at);
  to[0] = make_float4(dweight[0], dweight[1], dweight[2], dweight[3]);
  to[1] = make_float4(dweight[4], dweight[5], dweight[6], dweight[7]);
}

// parts [count, C] → their sums [C], in one order. Blocks of 32 columns × 8 rows of threads.
extern "C" __global__ void __launch_bounds__(THREADS) sum_parts(const float* parts, float* sums, int count, int C) {
  __shared__ float of_part[THREADS / 32][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
  begin();
  float sum = 0;
  if (column < C) {
#pragma unroll 8
    for (int part = warp; part < count; part += THREADS / 32) sum += __ldg(parts + (long long)part * C + column);
  }
  of_part[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= C) return;
  for (int i = 1; i < THREADS / 32; i++) sum += of_part[i][lane];
  sums[column] = sum;
}
