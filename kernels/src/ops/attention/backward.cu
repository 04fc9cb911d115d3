// The backward of causal softmax attention, whose queries and keys may be wider than its values: q, k [B, H, S, DK], v, dout
// [B, H, S, DV], BF16, the last dimension contiguous. Follows parts.cuh.
//
// A block owns 128 keys of a head, 64 a warpgroup, and goes over the queries that see them, 64 at a time. Scores stand with the
// keys along the rows, so that what the registers hold of them multiplies from the left as it is: dV += Pᵀ · dout,
// dK += dSᵀ · Q. dQ = dS · K needs both warpgroups' dS: it goes through shared memory, each makes half the columns, and the copy
// engine adds them to FP32 sums in L2, which lie as the registers do.
//
//     P = 2^(S · scale · log2 e − lse · log2 e),  dS = P ⊙ (dout · Vᵀ − Σ dout ⊙ out),  both with scale left to the end
//
// What a warpgroup writes while products are under way must not be their operands, or the compiler makes each wait for the one
// before: all registers are in use, and there are moments when nothing is under way, so that they can change hands.

// Sᵀ or dPᵀ of 64 keys, whose panels have 32 or 64 columns.
static __device__ __forceinline__ void scores(float (&s)[QUERIES / 2], u32 k, u32 q) {
  product_rows(s, narrow(k), wide(q));
#pragma unroll
  for (int i = 1; i < DK / 16; i++) add_rows(s, narrow(k + i / 2 * (K_PANEL / 16) + i % 2 * 2), wide(q + i / 4 * (PANEL / 16) + i % 4 * 2));
  wgmma_commit();
}
static __device__ __forceinline__ void value_products(float (&dp)[QUERIES / 2], u32 v, u32 dout) {
  product_rows(dp, wide(v), wide(dout));
#pragma unroll
  for (int i = 1; i < DV / 16; i++) add_rows(dp, wide(v + i / 4 * (V_PANEL / 16) + i % 4 * 2), wide(dout + i / 4 * (PANEL / 16) + i % 4 * 2));
  wgmma_commit();
}

static __device__ __forceinline__ void probabilities(u32 (&p)[QUERIES / 4], const float (&s)[QUERIES / 2], u32 lse, float to_exponent) {
#pragma unroll
  for (int j = 0; j < QUERIES / 8; j++) {
    const float2 of = pair_at(lse + j * 32);
#pragma unroll
    for (int i = 2 * j; i < 2 * j + 2; i++) {
      p[i] = bf16_pair(exp2_of(s[2 * i] * to_exponent - of.x), exp2_of(s[2 * i + 1] * to_exponent - of.y));
    }
  }
}

// Queries before a key do not see it. `ahead`: how far the thread's first query is behind its first key.
static __device__ __forceinline__ void hide_future(u32 (&p)[QUERIES / 4], int ahead) {
#pragma unroll
  for (int i = 0; i < QUERIES / 4; i++) {
    const int over = ahead + i / 2 * 8 - i % 2 * 8;
    p[i] &= over >= 0 ? ~0u : over == -1 ? 0xFFFF0000u : 0u;
  }
}

static __device__ __forceinline__ void score_gradients(u32 (&ds)[QUERIES / 4], const u32 (&p)[QUERIES / 4], const float (&dp)[QUERIES / 2],
                                                       u32 delta) {
#pragma unroll
  for (int j = 0; j < QUERIES / 8; j++) {
    const float2 of = pair_at(delta + j * 32);
#pragma unroll
    for (int i = 2 * j; i < 2 * j + 2; i++) ds[i] = bf16_pair(low_bf16(p[i]) * (dp[2 * i] - of.x), high_bf16(p[i]) * (dp[2 * i + 1] - of.y));
  }
}

// A warpgroup's dSᵀ, swizzled. An instruction's four matrices are rows 0-7 and 8-15 of eight columns, then of the next eight.
static __device__ __forceinline__ void put(u32 to, const u32 (&ds)[QUERIES / 4], int me) {
  to += (me / 32 * 16 + me % 16) * 128;
#pragma unroll
  for (int j = 0; j < QUERIES / 16; j++) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to + ((2 * j + me / 16 % 2) ^ (me % 8)) * 16),
                 "r"(ds[4 * j]), "r"(ds[4 * j + 1]), "r"(ds[4 * j + 2]), "r"(ds[4 * j + 3])
                 : "memory");
  }
}

static __device__ __forceinline__ void put_sums(u32 to, const float (&dq)[HALF / 2], int me) {
#pragma unroll
  for (int j = 0; j < TILES; j++) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to + me * 16 + j * 2048), "f"(dq[4 * j]), "f"(dq[4 * j + 1]),
                 "f"(dq[4 * j + 2]), "f"(dq[4 * j + 3])
                 : "memory");
  }
}

// Of 64 keys, from the registers; and half the columns of dQ, from both warpgroups' dSᵀ.
static __device__ __forceinline__ void add_value_gradients(float (&dv)[DV / 2], const u32 (&p)[QUERIES / 4], u32 dout) {
#pragma unroll
  for (int j = 0; j < QUERIES / 16; j++) add_values(dv, p[4 * j], p[4 * j + 1], p[4 * j + 2], p[4 * j + 3], wide(dout + j * (16 * 128 / 16)));
  wgmma_commit();
}
static __device__ __forceinline__ void add_key_gradients(float (&dk)[DK / 2], const u32 (&ds)[QUERIES / 4], u32 q) {
#pragma unroll
  for (int j = 0; j < QUERIES / 16; j++) add_keys(dk, ds[4 * j], ds[4 * j + 1], ds[4 * j + 2], ds[4 * j + 3], wide(q + j * (16 * 128 / 16)));
  wgmma_commit();
}
static __device__ __forceinline__ void query_gradients(float (&dq)[HALF / 2], u32 ds, u32 k) {
  product_queries(dq, wide(ds), narrow(k));
#pragma unroll
  for (int j = 1; j < KEYS / 16; j++) add_queries(dq, wide(ds + j * (16 * 128 / 16)), narrow(k + j * (16 * 64 / 16)));
  wgmma_commit();
}

struct Outputs {
  float* dq_sums;  // [B, H, blocks of queries, SUMS]
  int* turns;      // [B, H, blocks, 2]
  u16 *dk, *dv;    // [B, S, H, DK], [B, S, H, DV]
};

template <int WARPGROUP>
static __device__ __forceinline__ void work(const Shared& at, const TensorMap& map_q, const TensorMap& map_dout, const float* stats,
                                            Outputs to, int S, int H, float scale) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  float dk[DK / 2], dv[DV / 2];
#pragma unroll
  for (int i = 0; i < DK / 2; i++) dk[i] = 0;
#pragma unroll
  for (int i = 0; i < DV / 2; i++) dv[i] = 0;
  const u32 my_k = low(at.k + WARPGROUP * 64 * 64), my_v = low(at.v + WARPGROUP * 64 * 128);
  const u32 half_k = low(at.k + WARPGROUP * (HALF / 32) * K_PANEL), all_ds = low(at.ds), my_dq = at.dq + WARPGROUP * DQ_BYTES;
  const Place here = place(S, H);
  const int count = (S + QUERIES - 1) / QUERIES - here.first, block = here.stats + here.first;
  Ring<STAGES> ring;
  barrier_wait(at.keys, 0);
#pragma unroll 1
  for (int i = 0; i < count; i++, ring.next()) {
    const u32 stage = __shfl_sync(~0u, ring.stage, 0);  // so that addresses lie in uniform registers
    const u32 q = low(at.q) + stage * (Q_BYTES / 16), dout = low(at.dout) + stage * (DO_BYTES / 16);
    const u32 lse = at.stats + stage * STATS_BYTES + lane % 4 * 8, delta = lse + QUERIES * 4;
    float s[QUERIES / 2], dp[QUERIES / 2], dq[HALF / 2];
    u32 p[QUERIES / 4], ds[QUERIES / 4];
    barrier_wait(at.full + 8 * stage, ring.parity);
    wgmma_fence();
    scores(s, my_k, q);
    value_products(dp, my_v, dout);
    // The other stage is free as soon as the other warpgroup has come here, too.
    if (WARPGROUP == 0 && threadIdx.x == 0 && i > 0 && i + 1 < count) {
      const u32 other = stage ^ 1;
      barrier_wait(at.empty + 8 * other, ring.parity ^ other);
      load_queries(at, other, map_q, map_dout, stats, here.first + i + 1, here);
    }
    wgmma_wait<1>();  // the scores
    probabilities(p, s, lse, scale * LOG2E);
    if (i < KEYS / QUERIES) hide_future(p, i * QUERIES + lane % 4 * 2 - (WARPGROUP * 64 + warp * 16 + lane / 4));
    wgmma_wait<0>();  // dPᵀ
    wgmma_fence();
    add_value_gradients(dv, p, dout);
    score_gradients(ds, p, dp, delta);
    if (i > 0) meet<2 + WARPGROUP, 256>();  // the other warpgroup has read the last dS
    const int me = thread();
    put(at.ds + WARPGROUP * 64 * 128, ds, me);
    fence_for_copies();
    wgmma_wait<0>();  // dV
    if (me == SENDER) boxes_read();  // the last dQ
    meet<1, 256>();
    wgmma_fence();
    query_gradients(dq, all_ds, half_k);
    add_key_gradients(dk, ds, q);
    if (me == SENDER && i > 0) end_turn(to.turns + 2 * (block + i - 1) + WARPGROUP);
    wgmma_wait<1>();  // dQ
    if (i + 1 < count) pass<3 - WARPGROUP, 256>();
    put_sums(my_dq, dq, me);
    fence_for_copies();
    meet<4 + WARPGROUP, 128>();
    if (me == SENDER) {
      float* sums = to.dq_sums + (2ll * (block + i) + WARPGROUP) * (SUMS / 2);
      add_in_turn(sums, my_dq, to.turns + 2 * (block + i) + WARPGROUP, i / (KEYS / QUERIES));
    }
    wgmma_wait<0>();  // dK
    if (lane == 0) barrier_arrive_here(at.empty + 8 * stage);
  }
  if (threadIdx.x % 128 == SENDER) end_turn(to.turns + 2 * (block + count - 1) + WARPGROUP);
  const Place end = place(S, H);
  const int me = thread(), row = end.key + WARPGROUP * 64 + me / 32 * 16;
  const long long token = ((long long)end.batch * S + row) * H + end.head;
  write<DK>(dk, to.dk + token * DK, H * DK, S - row, scale, me % 32);
  write<DV>(dv, to.dv + token * DV, H * DV, S - row, 1, me % 32);
}

// stats [B, H, blocks of queries, 2, 64]; outputs as they say above.
extern "C" __global__ void __launch_bounds__(256, 1)
    attention_backward(const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_k,
                       const __grid_constant__ TensorMap map_v, const __grid_constant__ TensorMap map_dout, const float* stats,
                       float* dq_sums, int* turns, u16* dk, u16* dv, int S, int H, float scale) {
  extern __shared__ u8 raw[];
  const Shared at = shared(shared_address(raw));
  if (threadIdx.x == 0) {
    barrier_init(at.keys, 1);
    for (int s = 0; s < STAGES; s++) barrier_init(at.full + 8 * s, 1), barrier_init(at.empty + 8 * s, WARPS);
    barrier_init_done();
    prefetch_map(map_q), prefetch_map(map_k), prefetch_map(map_v), prefetch_map(map_dout);
  }
  begin();
  if (threadIdx.x == 0) {
    const Place here = place(S, H);
    load_keys(at, map_k, map_v, here);
    load_queries(at, 0, map_q, map_dout, stats, here.first, here);
    if (here.first + 1 < (S + QUERIES - 1) / QUERIES) load_queries(at, 1, map_q, map_dout, stats, here.first + 1, here);
  }
  __syncthreads();
  const Outputs to = {dq_sums, turns, dk, dv};
  if (threadIdx.x < 128) {
    work<0>(at, map_q, map_dout, stats, to, S, H, scale);
  } else {
    work<1>(at, map_q, map_dout, stats, to, S, H, scale);
  }
}
