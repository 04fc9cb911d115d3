// What goes before and after backward.cu. Follows hopper.cuh.
//
// Defined from outside: DK, DV. A block has 64 queries of one head; its neighbours have the other heads', which lie beside them in
// memory.
constexpr int QUERIES = 64, THREADS = 256, SUMS = QUERIES * DK, TILES = DK / 8;
constexpr float LOG2E = 1.4426950408889634f;

// out, dout [B, S, H, DV], lse [B, H, S] → stats [B, H, blocks, 2, 64]: lse in powers of two and Σ dout ⊙ out of each query; of
// those past the end so that their probabilities come out as zero. turns [B, H, blocks, 2] begin at zero.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_prepare(const u16* out, const u16* dout, const float* lse, float* stats, int* turns, int S, int H) {
  constexpr int LANES = DV / 8, AT_ONCE = THREADS / LANES, TURNS = QUERIES / AT_ONCE;
  begin();
  const long long place = (long long)blockIdx.x * gridDim.y + blockIdx.y;
  const int head = blockIdx.x % H, batch = blockIdx.x / H, first = blockIdx.y * QUERIES, lane = threadIdx.x % LANES;
  uint4 of_out[TURNS] = {}, of_dout[TURNS] = {};
#pragma unroll
  for (int i = 0; i < TURNS; i++) {
    const int query = first + i * AT_ONCE + threadIdx.x / LANES;
    const long long at = (((long long)batch * S + query) * H + head) * DV + lane * 8;
    if (query < S) of_out[i] = __ldcs((const uint4*)(out + at)), of_dout[i] = __ldg((const uint4*)(dout + at));
  }
  if (threadIdx.x < 2) turns[2 * place + threadIdx.x] = 0;
  stats += place * (2 * QUERIES);
#pragma unroll
  for (int i = 0; i < TURNS; i++) {
    const u32 a[4] = {of_out[i].x, of_out[i].y, of_out[i].z, of_out[i].w};
    const u32 b[4] = {of_dout[i].x, of_dout[i].y, of_dout[i].z, of_dout[i].w};
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) sum += low_bf16(a[j]) * low_bf16(b[j]) + high_bf16(a[j]) * high_bf16(b[j]);
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) stats[QUERIES + i * AT_ONCE + threadIdx.x / LANES] = sum;
  }
  if (threadIdx.x < QUERIES) {
    const int query = first + threadIdx.x;
    stats[threadIdx.x] = query < S ? lse[(long long)blockIdx.x * S + query] * LOG2E : __int_as_float(0x7f800000);
  }
}

// dq_sums as the registers of backward.cu held them → dq [B, S, H, DK], times `scale`. A lane has pairs of every eight columns, of two
// rows: whole rows are made in shared memory.
extern "C" __global__ void __launch_bounds__(THREADS) attention_finish(const float* dq_sums, u16* dq, int S, int H, float scale) {
  constexpr int PITCH = DK + 8;  // neither words nor rows of eight lanes meet in a bank
  __shared__ __align__(16) u16 rows[QUERIES * PITCH];
  begin();
  const int head = blockIdx.x % H, batch = blockIdx.x / H, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int half = threadIdx.x / 128 * (TILES / 2);
  const float4* sums = (const float4*)(dq_sums + ((long long)blockIdx.x * gridDim.y + blockIdx.y) * SUMS) + half * 128 + threadIdx.x % 128;
  u32* mine = (u32*)(rows + (warp * 16 + lane / 4) * PITCH + half * 8) + lane % 4;
#pragma unroll
  for (int i = 0; i < TILES / 2; i++) {
    const float4 sum = __ldcs(sums + i * 128);
    mine[4 * i] = bf16_pair(sum.x * scale, sum.y * scale), mine[4 * i + 4 * PITCH] = bf16_pair(sum.z * scale, sum.w * scale);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < QUERIES * TILES / THREADS; i++) {
    const int unit = i * THREADS + threadIdx.x, row = unit / TILES, at = unit % TILES * 8, query = blockIdx.y * QUERIES + row;
    if (query < S) *(uint4*)(dq + (((long long)batch * S + query) * H + head) * DK + at) = *(const uint4*)(rows + row * PITCH + at);
  }
}
