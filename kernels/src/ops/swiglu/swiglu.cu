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
  if (gate_values) write_rows(gate, gate_out, place, column_tile), write_rows(up, up_out, place, column_tile);
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

struct Saved {
  const u16* gate_up;                // [R, 2I]
  const u8 *gate_values, *up_values;  // or [R, I] each
  const float *gate_scales, *up_scales;
};

static __device__ __forceinline__ void load_saved(float (&g)[8], float (&u)[8], const Saved& saved, long long row,
                                                  int column, int I, int scale_stride, bool there) {
  if (SAVED_FP8) {
    const uint2 none = make_uint2(0, 0);
    const long long at = row * I + column, scale_at = (long long)(column / TILE) * scale_stride + row;
    unpack_fp8(g, there ? __ldg((const uint2*)(saved.gate_values + at)) : none, there ? __ldg(saved.gate_scales + scale_at) : 0);
    unpack_fp8(u, there ? __ldg((const uint2*)(saved.up_values + at)) : none, there ? __ldg(saved.up_scales + scale_at) : 0);
  } else {
    const u16* from = saved.gate_up + row * 2 * I + column;
    unpack_bf16(g, load_eight(from, there)), unpack_bf16(u, load_eight(from + I, there));
  }
}

// dact [R, I] → d[gate, up] [R, 2I] in the layouts wanted; act by columns, if wanted; dweights [tiles of I, R], each
// tile's part of d(row weight), if there are weights. One block a tile of dact; I is a multiple of 128.
extern "C" __global__ void __launch_bounds__(THREADS, SAVED_FP8 ? 2 : 1)
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
  const Saved saved = {gate_up, gate_values, up_values, gate_scales, up_scales};
  __shared__ uint4 parked[2][8][THREADS];  // d(gate) and d(up) wait here: registers hold one tile, not three
  Tile act = empty_tile<Tile>();
  const int column = column_tile * TILE + act.column, there = place.valid_rows - act.row;
  const long long first_row = place.first_row + act.row;
#pragma unroll
  for (int r = 0; r < 8; r++) {
    const long long row = first_row + r;
    float g[8], u[8], d[8], dweight = 0;
    load_saved(g, u, saved, row, column, I, scale_stride, r < there);
    unpack_bf16(d, load_eight(dact + row * I + column, r < there));
    const float weight = row_weight && r < there ? __ldg(row_weight + row) : 1.0f;
#pragma unroll
    for (int c = 0; c < 8; c++) {
      const float s = sigmoid(g[c]), silu = g[c] * s, slope = s * (1.0f + g[c] * (1.0f - s));
      dweight += d[c] * silu * u[c];
      d[c] *= weight;
      g[c] = d[c] * u[c] * slope, u[c] *= weight * silu, d[c] *= silu;
    }
    set_row(act, r, bf16_eight(u));
    parked[0][r][threadIdx.x] = bf16_eight(g), parked[1][r][threadIdx.x] = bf16_eight(d);
    if (dweights) {
      dweight = sum_over_row(dweight);
      if (act.column == 0 && r < there) dweights[(long long)column_tile * R + row] = dweight;
    }
  }
  const Out act_out = {nullptr, nullptr, act_transposed, act_scales, I, P, 0, act_scale_stride};
  const Out out = {values, scales, transposed, scales_transposed, 2 * I, P, scale_stride, scale_stride_transposed};
  emit(act, act_out, place, row_tile, column_tile, scratch);
#pragma unroll
  for (int half = 0; half < 2; half++) {
#pragma unroll
    for (int r = 0; r < 8; r++) set_row(act, r, parked[half][r][threadIdx.x]);
    emit(act, out, place, row_tile, column_tile + half * (I / TILE), scratch);
  }
}
