// AdamW with decoupled weight decay on an FP32 master and BF16 or FP32 moments; the BF16 weight, and for the matrices of
// FP8 linears their blocks, are written in the same pass. Follows tile.cuh.
#if MOMENTS_FP32
using moment = float;
static __device__ __forceinline__ void load_moments(float (&m)[8], const moment* from) {
  const float4 a = __ldcs((const float4*)from), b = __ldcs((const float4*)from + 1);
  m[0] = a.x, m[1] = a.y, m[2] = a.z, m[3] = a.w, m[4] = b.x, m[5] = b.y, m[6] = b.z, m[7] = b.w;
}
static __device__ __forceinline__ void store_moments(moment* to, const float (&m)[8]) {
  __stcs((float4*)to, make_float4(m[0], m[1], m[2], m[3]));
  __stcs((float4*)to + 1, make_float4(m[4], m[5], m[6], m[7]));
}
static __device__ __forceinline__ float wide(moment m) { return m; }
static __device__ __forceinline__ moment narrow(float m) { return m; }
#else
using moment = u16;
static __device__ __forceinline__ void load_moments(float (&m)[8], const moment* from) {
  unpack_bf16(m, __ldcs((const uint4*)from));
}
static __device__ __forceinline__ void store_moments(moment* to, const float (&m)[8]) { __stcs((uint4*)to, bf16_eight(m)); }
static __device__ __forceinline__ float wide(moment m) { return __uint_as_float((u32)m << 16); }
static __device__ __forceinline__ moment narrow(float m) { return (u16)bf16_pair(m, 0); }
#endif

struct Rule {
  float beta1, beta2, eps, decay, step_size, correction;  // w·decay − step_size · m / (√v · correction + eps)
};

static __device__ __forceinline__ void update(const Rule& rule, float& w, float& m, float& v, float g) {
  m = rule.beta1 * m + (1.0f - rule.beta1) * g;
  v = rule.beta2 * v + (1.0f - rule.beta2) * g * g;
  w = w * rule.decay - rule.step_size * m / (sqrtf(v) * rule.correction + rule.eps);
}

// Eight elements at `at`: read, updated, written; the new masters in `w`.
static __device__ __forceinline__ void update_eight(const Rule& rule, float (&w)[8], float* master, moment* first, moment* second,
                                                    const float* gradient, u16* weight, float clip, long long at) {
  const float4 w0 = __ldcs((const float4*)(master + at)), w1 = __ldcs((const float4*)(master + at) + 1);
  const float4 g0 = __ldcs((const float4*)(gradient + at)), g1 = __ldcs((const float4*)(gradient + at) + 1);
  float m[8], v[8];
  load_moments(m, first + at), load_moments(v, second + at);
  const float g[8] = {g0.x, g0.y, g0.z, g0.w, g1.x, g1.y, g1.z, g1.w};
  w[0] = w0.x, w[1] = w0.y, w[2] = w0.z, w[3] = w0.w, w[4] = w1.x, w[5] = w1.y, w[6] = w1.z, w[7] = w1.w;
#pragma unroll
  for (int i = 0; i < 8; i++) update(rule, w[i], m[i], v[i], g[i] * clip);
  __stcs((float4*)(master + at), make_float4(w[0], w[1], w[2], w[3]));
  __stcs((float4*)(master + at) + 1, make_float4(w[4], w[5], w[6], w[7]));
  store_moments(first + at, m), store_moments(second + at, v);
  if (weight) *(uint4*)(weight + at) = bf16_eight(w);
}

// A clip factor that is no number: the gradient was not finite, nothing changes.
static __device__ __forceinline__ bool skipped(float clip) { return !(clip <= 1e30f); }

extern "C" __global__ void __launch_bounds__(THREADS)
    adamw(float* master, moment* first, moment* second, const float* gradient, u16* weight, const float* clip_at, float clip_by, float beta1,
          float beta2, float eps, float decay, float step_size, float correction, int count) {
  const Rule rule = {beta1, beta2, eps, decay, step_size, correction};
  const float clip = __ldg(clip_at) * clip_by;
  if (skipped(clip)) return;
  const long long stride = (long long)gridDim.x * THREADS * 8;
  long long at = ((long long)blockIdx.x * THREADS + threadIdx.x) * 8;
  for (; at + 8 <= count; at += stride) {
    float w[8];
    update_eight(rule, w, master, first, second, gradient, weight, clip, at);
  }
  if (at < count) {  // one thread has the rest
    for (; at < count; at++) {
      float w = master[at], m = wide(first[at]), v = wide(second[at]);
      update(rule, w, m, v, gradient[at] * clip);
      master[at] = w, first[at] = narrow(m), second[at] = narrow(v);
      if (weight) weight[at] = (u16)bf16_pair(w, 0);
    }
  }
}

// The same for [matrices, R, C], with blocks of the new weight, BF16, and of its transpose.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    adamw_blocks(float* master, moment* first, moment* second, const float* gradient, u16* weight, const float* clip_at, float clip_by,
                 float beta1, float beta2, float eps, float decay, float step_size, float correction, u8* values,
                 float* scales, u8* transposed, float* scales_transposed, int R, int C) {
  __shared__ Scratch scratch;
  const Rule rule = {beta1, beta2, eps, decay, step_size, correction};
  const float clip = __ldg(clip_at) * clip_by;
  if (skipped(clip)) return;
  const int row_tiles = (R + TILE - 1) / TILE, column_tiles = (C + TILE - 1) / TILE;
  const int column_tile = blockIdx.x % column_tiles, tile_row = blockIdx.x / column_tiles;
  const int row_tile = tile_row % row_tiles, matrix = tile_row / row_tiles;
  const long long start = (long long)matrix * R * C, first_scale = (long long)matrix * row_tiles * column_tiles;
  const Out out = {values + start, scales + first_scale, transposed + start, scales_transposed + first_scale, C, R, 0, 0};
  WideTile t = empty_tile<WideTile>();
  const int row = row_tile * TILE + t.row, column = column_tile * TILE + t.column;
#pragma unroll
  for (int r = 0; r < 8; r++) {
    if (column < C && row + r < R) {
      update_eight(rule, t.v[r], master, first, second, gradient, weight, clip, start + (long long)(row + r) * C + column);
      unpack_bf16(t.v[r], bf16_eight(t.v[r]));  // the blocks are those of the weight
    } else {
#pragma unroll
      for (int c = 0; c < 8; c++) t.v[r][c] = 0;
    }
  }
  emit_block(t, out, row_tile, column_tile, scratch);
}
