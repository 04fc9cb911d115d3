// act = weight · silu(gate) · up straight into FP8, and its backward with the activation made again. Follows tile.cuh.
//
// Defined from outside: SAVED_FP8: backward's gate and up are FP8 by rows (else BF16, packed [R, 2I]).
static __device__ __forceinline__ float sigmoid(float x) {
  float e, s;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.0f + e));
  return s;
}

// gate_up [R, 2I], row_weight [R] or null → act in the layouts wanted, and gate and up by rows to keep for backward.
// One block a tile of act; `counts` cuts the rows into experts.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    swiglu(const u16* gate_up, const float* row_weight, u8* gate_values, float* gate_scales, u8* up_values,
           float* up_scales, u8* values, float* scales, u8* transposed, float* scales_transposed, const int* counts,
           int num_experts, int R, int C, int P, int scale_stride, int scale_stride_transposed) {
  __shared__ Scratch scratch;
  begin();
  const Out out = {values, scales, transposed, scales_transposed, C, P, scale_stride, scale_stride_transposed};
  const Out gate_out = {gate_values, gate_scales, nullptr, nullptr, C, P, scale_stride, 0};
  const Out up_out = {up_values, up_scales, nullptr, nullptr, C, P, scale_stride, 0};
  const int column_tile = blockIdx.x, row_tile = blockIdx.y;
  const Place place = find(counts, num_experts, R, row_tile);
  if (place.valid_rows <= 0) return;
  Tile gate = empty_tile<Tile>(), up = gate;
  const int column = column_tile * TILE + gate.column, there = column < C ? place.valid_rows - gate.row : 0;
  const long long first_row = place.first_row + gate.row;
#pragma unroll
  for (int r = 0; r < 8; r++) {
    const u16* from = gate_up + (first_row + r) * 2 * C + column;
    set_row(gate, r, load_eight(from, r < there)), set_row(up, r, load_eight(from + C, r < there));
  }
  if (gate_values) {
    write_rows(gate, most_of(gate).of_rows, gate_out, place, column_tile);
    write_rows(up, most_of(up).of_rows, up_out, place, column_tile);
  }
  // The activation takes the gate's place.
#pragma unroll
  for (int r = 0; r < 8; r++) {
    const float weight = row_weight && r < there ? __ldg(row_weight + first_row + r) : 1.0f;
    float act[8];
#pragma unroll
    for (int c = 0; c < 8; c++) {
      const float g = value(gate, r, c);
      act[c] = g * sigmoid(g) * value(up, r, c) * weight;
    }
    set_row(gate, r, bf16_eight(act));
  }
  emit(gate, out, place, row_tile, column_tile, scratch);
}

// dact [R, I] → d[gate, up] [R, 2I] in the layouts wanted; act by columns, if wanted; dweights [tiles of I, R], each
// tile's part of d(row weight), if there are weights. One block a tile of dact; I is a multiple of 128.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    swiglu_backward(const u16* dact, const u16* gate_up, const u8* gate_values, const float* gate_scales,
                    const u8* up_values, const float* up_scales, const float* row_weight, float* dweights,
                    u8* act_transposed, float* act_scales, u8* values, float* scales, u8* transposed,
                    float* scales_transposed, const int* counts, int num_experts, int R, int I, int P, int scale_stride,
                    int scale_stride_transposed, int act_scale_stride) {
  __shared__ Scratch scratch;
  begin();
  const int column_tile = blockIdx.x, row_tile = blockIdx.y;
  const Place place = find(counts, num_experts, R, row_tile);
  if (place.valid_rows <= 0) return;
  // A thread's values come here past the registers, all at once, and d(gate) and d(up) wait in their places: registers hold
  // one tile, not three.
  __shared__ uint4 parked[2][8][THREADS];
  Tile act = empty_tile<Tile>();
  const int column = column_tile * TILE + act.column, there = place.valid_rows - act.row;
  const long long first_row = place.first_row + act.row;
#pragma unroll
  for (int r = 0; r < 8; r++) {
    const long long row = r < there ? first_row + r : 0, at = row * I + column;
    fetch_sixteen(&parked[0][r][threadIdx.x], dact + at, r < there);
    if (SAVED_FP8) {
      uint2* to = (uint2*)&parked[1][r][threadIdx.x];
      fetch_eight(to, gate_values + at, r < there), fetch_eight(to + 1, up_values + at, r < there);
    }
  }
  // Of the 16 threads that share the rows, eight hold what belongs to one row each.
  const int mine = threadIdx.x % 8;
  const bool is_there = mine < place.valid_rows - act.row;
  float scale_of_row = 0, weight_of_row = 1.0f;
  if (SAVED_FP8 && is_there) {
    scale_of_row = __ldg((threadIdx.x & 8 ? up_scales : gate_scales) + (long long)column_tile * scale_stride + first_row + mine);
  }
  if (row_weight && is_there) weight_of_row = __ldg(row_weight + first_row + mine);
  float dweight[8] = {};
  fetched();
#pragma unroll
  for (int r = 0; r < 8; r++) {
    const long long row = first_row + r;
    float g[8], u[8], d[8];
    if (SAVED_FP8) {
      const uint4 both = parked[1][r][threadIdx.x];
      unpack_fp8(g, {both.x, both.y}, __shfl_sync(~0u, scale_of_row, r, 16));
      unpack_fp8(u, {both.z, both.w}, __shfl_sync(~0u, scale_of_row, r + 8, 16));
    } else {
      const u16* from = gate_up + row * 2 * I + column;
      unpack_bf16(g, load_eight(from, r < there)), unpack_bf16(u, load_eight(from + I, r < there));
    }
    unpack_bf16(d, parked[0][r][threadIdx.x]);
    const float weight = __shfl_sync(~0u, weight_of_row, r, 16);
#pragma unroll
    for (int c = 0; c < 8; c++) {
      const float s = sigmoid(g[c]), silu = g[c] * s, slope = s + silu * (1.0f - s), product = silu * u[c];
      dweight[r] += d[c] * product;
      d[c] *= weight;
      g[c] = d[c] * (u[c] * slope), u[c] = weight * product, d[c] *= silu;
    }
    set_row(act, r, bf16_eight(u));
    parked[0][r][threadIdx.x] = bf16_eight(g), parked[1][r][threadIdx.x] = bf16_eight(d);
  }
  if (dweights) {
    const float sum = sums_over_rows(dweight);
    const int r = threadIdx.x / 2 % 8;
    if (threadIdx.x % 2 == 0 && r < there) dweights[(long long)column_tile * R + first_row + r] = sum;
  }
  const Out act_out = {nullptr, nullptr, act_transposed, act_scales, I, P, 0, act_scale_stride};
  const Out out = {values, scales, transposed, scales_transposed, 2 * I, P, scale_stride, scale_stride_transposed};
  emit(act, act_out, place, row_tile, column_tile, scratch);
  // One code for both: half as much for the instruction cache.
#pragma unroll 1
  for (int half = 0; half < 2; half++) {
#pragma unroll
    for (int r = 0; r < 8; r++) set_row(act, r, parked[half][r][threadIdx.x]);
    emit(act, out, place, row_tile, column_tile + half * (I / TILE), scratch);
  }
}

// parts [tiles, R] → their sums [R], in one order; zeros for rows that are no expert's. Blocks of 32 rows × 8 warps.
extern "C" __global__ void __launch_bounds__(THREADS)
    sum_weights(const float* parts, float* sums, const int* counts, int num_experts, int R, int tiles) {
  __shared__ float of_part[THREADS / 32][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = blockIdx.x * 32 + lane;
  begin();
  int rows = counts ? 0 : R;
  for (int expert = 0; counts && expert < num_experts; expert++) rows += __ldg(counts + expert);
  float sum = 0;
  if (row < rows) {
#pragma unroll 8
    for (int part = warp; part < tiles; part += THREADS / 32) sum += __ldg(parts + (long long)part * R + row);
  }
  of_part[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || row >= R) return;
  for (int i = 1; i < THREADS / 32; i++) sum += of_part[i][lane];
  sums[row] = sum;
}
