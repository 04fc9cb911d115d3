// D[M, N] = A[M, K] · B[N, K]ᵀ of FP8 operands, scaled 1×128 (A) and 128×128 (B); rows of several experts lie one
// after another, each with its own B. Follows hopper.cuh and wgmma().
//
// Defined from outside: WARPGROUPS, each with SUBTILES of 64 rows, BN columns of a tile, STAGES of the ring, OUT_FP32 (else BF16), ORDERED
// (hopper.cuh), PROMOTE (0 shows what the promotion is for).
//
// Persistent clusters of two blocks: the two compute neighbouring tiles along N, each loads half of the A tile for
// both. A producer thread fills the ring; the warpgroups multiply, and add every 128 of K into FP32.
constexpr int BM = 64 * WARPGROUPS * SUBTILES, BK = 128, GROUP = 2048 / BM, CONSUMER_WARPS = 4 * WARPGROUPS;
// The copy engine starts on 16 bytes, an expert's rows on any: four scales more than rows. A box has 256 at most.
constexpr int SA_BOXES = SUBTILES, SA_LOAD = (BM / SA_BOXES + 4) * 4, SA_STRIDE = (SA_LOAD + 127) / 128 * 128;
constexpr int SA_BYTES = SA_BOXES * SA_STRIDE, A_BYTES = BM * BK, B_BYTES = BN * BK;
constexpr int STAGE_BYTES = A_BYTES + B_BYTES + SA_BOXES * SA_LOAD;
// Small tiles have registers for two accumulators.
constexpr bool PAIRED = WARPGROUPS == 2 && SUBTILES == 1;
// Epilogue: each warp turns 16 rows × 8·CHUNK columns at a time; 16 bytes of padding keep the banks apart.
constexpr int CHUNK = BN % 64 == 0 && WARPGROUPS == 2 ? 8 : 4, OUT_ROW_BYTES = CHUNK * 16 + 16;
constexpr int OUT_BYTES = CONSUMER_WARPS * 16 * OUT_ROW_BYTES;
// A tile meets two B scales at most; the boundary lies on a multiple of STEP groups of eight columns.
static __device__ constexpr int gcd(int a, int b) { return b ? gcd(b, a % b) : a; }
constexpr int STEP = gcd(BN, 128) / 8;
static_assert(BN % 8 == 0 && 128 - 8 * STEP + BN <= 256, "a tile may meet two B scales, not three");

struct Shared {
  u32 a, b, scales, out, full, empty;
};

// Tiles in the order in which they are computed: expert by expert, bands of GROUP tiles along M (they share B in L2).
struct Walk {
  const int* counts;
  int num_rows, num_experts, num_pairs;
  int expert = 0, first_row = 0, count = 0, first_unit = 0;
  int row = 0, pair = 0;  // of the current tile: its first row within the expert, its pair of tiles along N

  __device__ __forceinline__ Walk(const int* counts, int num_rows, int num_experts, int num_pairs)
      : counts(counts), num_rows(num_rows), num_experts(num_experts), num_pairs(num_pairs) {
    count = rows_of(0);
  }
  __device__ __forceinline__ int rows_of(int expert) const { return counts ? load_count(counts + expert) : num_rows; }
  __device__ __forceinline__ bool seek(int unit) {
    int tiles = (count + BM - 1) / BM;
    while (unit >= first_unit + tiles * num_pairs) {
      first_unit += tiles * num_pairs;
      first_row += count;
      if (++expert == num_experts) return false;
      count = rows_of(expert);
      tiles = (count + BM - 1) / BM;
    }
    int local = unit - first_unit, band = local / (GROUP * num_pairs);
    int height = min(GROUP, tiles - band * GROUP);
    local -= band * GROUP * num_pairs;
    row = (band * GROUP + local % height) * BM;
    pair = local / height;
    return true;
  }
};

template <int BOUNDARY>
static __device__ __forceinline__ void promote(float (&sum)[BN / 2], const float (&acc)[BN / 2], float s00, float s10,
                                               float s01, float s11) {
#pragma unroll
  for (int j = 0; j < BN / 8; j++) {
    float upper = j < BOUNDARY ? s00 : s01, lower = j < BOUNDARY ? s10 : s11;
    sum[4 * j] += acc[4 * j] * upper;
    sum[4 * j + 1] += acc[4 * j + 1] * upper;
    sum[4 * j + 2] += acc[4 * j + 2] * lower;
    sum[4 * j + 3] += acc[4 * j + 3] * lower;
  }
}

// The boundary is a number of the tile: one branch a K tile instead of a choice for every column.
static __device__ __forceinline__ void promote_at(int boundary, float (&sum)[BN / 2], const float (&acc)[BN / 2],
                                                  float s00, float s10, float s01, float s11) {
  if constexpr (128 % BN == 0) {
    promote<BN / 8>(sum, acc, s00, s10, s01, s11);
  } else {
    switch (boundary) {
// A boundary that this width never meets gets a label that never comes.
#define AT(n) \
  case n % STEP == 0 && n < BN / 8 ? n : 100 + n: \
    promote<n>(sum, acc, s00, s10, s01, s11); \
    break;
      AT(1) AT(2) AT(3) AT(4) AT(5) AT(6) AT(7) AT(8) AT(9) AT(10) AT(11) AT(12) AT(13) AT(14) AT(15) AT(16)
#undef AT
      default: promote<BN / 8>(sum, acc, s00, s10, s01, s11);
    }
  }
}

static __device__ __forceinline__ u32 bf16_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// One warp's 16 rows through shared memory, so that global rows are written 16 bytes a thread and 128 bytes a line.
static __device__ __forceinline__ void store_bf16(const float (&sum)[BN / 2], u32 buffer, u16* d, int valid_rows,
                                                  int valid_columns, int N, int lane) {
  const u32 put = buffer + (lane & 15) * OUT_ROW_BYTES + (lane >> 4) * 16;
#pragma unroll
  for (int chunk = 0; chunk < BN / 8; chunk += CHUNK) {
    constexpr int ALL = BN / 8;
    const int width = ALL - chunk < CHUNK ? ALL - chunk : CHUNK;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < width; j += 2) {
      const float* f = sum + 4 * (chunk + j);
      if (j + 1 < width) {
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(put + j * 16),
                     "r"(bf16_pair(f[0], f[1])), "r"(bf16_pair(f[2], f[3])), "r"(bf16_pair(f[4], f[5])),
                     "r"(bf16_pair(f[6], f[7]))
                     : "memory");
      } else {
        asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(put + j * 16),
                     "r"(bf16_pair(f[0], f[1])), "r"(bf16_pair(f[2], f[3]))
                     : "memory");
      }
    }
    __syncwarp();
#pragma unroll
    for (int first = 0; first < 16 * width; first += 32) {
      const int piece = first + lane, row = piece / width, column = piece % width;
      if (piece < 16 * width) {
        u32 v0, v1, v2, v3;
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v0), "=r"(v1), "=r"(v2), "=r"(v3)
                     : "r"(buffer + row * OUT_ROW_BYTES + column * 16));
        const int n = 8 * (chunk + column);
        if (row < valid_rows && n < valid_columns) {
          asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(d + (long long)row * N + n), "r"(v0), "r"(v1),
                       "r"(v2), "r"(v3)
                       : "memory");
        }
      }
    }
  }
}

static __device__ __forceinline__ void store_fp32(const float (&sum)[BN / 2], float* d, int valid_rows,
                                                  int valid_columns, int N, int lane) {
#pragma unroll
  for (int i = 0; i < BN / 2; i += 2) {
    const int row = lane / 4 + (i / 2 % 2) * 8, n = i / 4 * 8 + lane % 4 * 2;
    if (row < valid_rows && n < valid_columns) *(float2*)(d + (long long)row * N + n) = make_float2(sum[i], sum[i + 1]);
  }
}

static __device__ __forceinline__ void produce(const Shared& at, const TensorMap& map_a, const TensorMap& map_sa,
                                               const TensorMap& map_b, Walk walk, int N, int num_k, u32 rank) {
  Ring<STAGES> ring;
  for (int unit = blockIdx.x / 2; walk.seek(unit); unit += gridDim.x / 2) {
    const int row = walk.first_row + walk.row, column = (2 * walk.pair + rank) * BN;
#pragma unroll (PAIRED ? 4 : 1)
    for (int k = 0; k < num_k; k++, ring.next()) {
      const u32 full = at.full + 8 * ring.stage;
      barrier_wait(at.empty + 8 * ring.stage, ring.parity ^ 1);
      barrier_expect(full, STAGE_BYTES);
      const u32 half = rank * (A_BYTES / 2);
      load_box_for_both(at.a + ring.stage * A_BYTES + half, map_a, full, k * BK, row + rank * (BM / 2));
      load_box(at.b + ring.stage * B_BYTES, map_b, full, k * BK, walk.expert * N + column);
      for (int i = 0; i < SA_BOXES; i++) {
        load_box(at.scales + ring.stage * SA_BYTES + i * SA_STRIDE, map_sa, full, (row & ~3) + i * (BM / SA_BOXES), k);
      }
    }
  }
}

// The scales of this thread's two rows in one stage.
static __device__ __forceinline__ float2 row_scales(u32 from) {
  float2 scales;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(scales.x) : "r"(from) : "memory");
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(scales.y) : "r"(from + 32) : "memory");
  return scales;
}

// PAIRED: two K tiles at a time, each with an accumulator of its own: while the first is added up, the second is
// multiplied, and while that is added up, the other warpgroup has its turn. Else one accumulator, and the other
// warpgroups cover for it; SUBTILES share the B tile, which spares shared memory's bandwidth.
static __device__ __forceinline__ void consume(const Shared& at, const float* scale_b, void* d, Walk walk, int N,
                                               int num_k, u32 rank) {
  const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32, blocks_n = (N + 127) / 128;
  const Turns turns(warp / 4);
  Ring<STAGES> ring;
  float sum[SUBTILES][BN / 2], acc0[BN / 2], acc1[BN / 2];
  auto multiply = [&](float(&acc)[BN / 2], u32 stage, int subtile, bool add) {
    const u64 a = matrix_descriptor(at.a + stage * A_BYTES + (subtile * WARPGROUPS + warp / 4) * (64 * BK));
    const u64 b = matrix_descriptor(at.b + stage * B_BYTES);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma(acc, a + 2 * step, b + 2 * step, step > 0 || add);
    wgmma_commit();
  };
  auto release = [&](u32 stage) {
    if (lane < 2) barrier_arrive(at.empty + 8 * stage, lane);
  };
  // A lane holds B's scales of one K tile in 32; the next batch, or the next tile's first, is on its way.
  const float *scale0, *scale1;
  float batch0 = 0, batch1 = 0, ahead0, ahead1;
  auto begin = [&](int unit) {
    if (!walk.seek(unit)) return false;
    const int block = min((2 * walk.pair + rank) * BN / 128, blocks_n - 1), next_block = min(block + 1, blocks_n - 1);
    scale0 = scale_b + (long long)(walk.expert * blocks_n + block) * num_k;
    scale1 = scale_b + (long long)(walk.expert * blocks_n + next_block) * num_k;
    ahead0 = __ldg(scale0 + min(lane, num_k - 1)), ahead1 = __ldg(scale1 + min(lane, num_k - 1));
    return true;
  };
  int unit = blockIdx.x / 2;
  for (bool more = begin(unit); more;) {
    const u32 my_scales = at.scales + (warp * 16 + lane / 4 + ((walk.first_row + walk.row) & 3)) * 4;
    const int column = (2 * walk.pair + rank) * BN, boundary = (128 - column % 128) / 8;
#pragma unroll
    for (int i = 0; i < SUBTILES * (BN / 2); i++) sum[i / (BN / 2)][i % (BN / 2)] = 0;
    for (int k = 0; k < num_k; k += PAIRED ? 2 : 1) {
      if (k % 32 == 0) {
        batch0 = ahead0, batch1 = ahead1;
        const int mine = min(k + 32 + lane, num_k - 1);
        ahead0 = __ldg(scale0 + mine), ahead1 = __ldg(scale1 + mine);
      }
      const u32 stage0 = ring.stage;
      barrier_wait(at.full + 8 * ring.stage, ring.parity);
      ring.next();
      const bool add0 = PROMOTE || k + (PAIRED ? 2 : 1) >= num_k, add1 = add0 || k + 3 >= num_k;
      if (PAIRED && k + 1 < num_k) {
        const float2 rows0 = row_scales(my_scales + stage0 * SA_BYTES);
        turns.take();
        multiply(acc0, stage0, 0, !PROMOTE && k > 0);
        const u32 stage1 = ring.stage;
        barrier_wait(at.full + 8 * ring.stage, ring.parity);
        ring.next();
        const float2 rows1 = row_scales(my_scales + stage1 * SA_BYTES);
        multiply(acc1, stage1, 0, !PROMOTE && k > 0);
        turns.give();
        const float b0 = __shfl_sync(~0u, batch0, k % 32), b1 = __shfl_sync(~0u, batch1, k % 32);
        const float c0 = __shfl_sync(~0u, batch0, k % 32 + 1), c1 = __shfl_sync(~0u, batch1, k % 32 + 1);
        wgmma_wait<1>();
        release(stage0);
        if (add0) promote_at(boundary, sum[0], acc0, rows0.x * b0, rows0.y * b0, rows0.x * b1, rows0.y * b1);
        wgmma_wait<0>();
        release(stage1);
        if (add1) promote_at(boundary, sum[0], acc1, rows1.x * c0, rows1.y * c0, rows1.x * c1, rows1.y * c1);
      } else {
#pragma unroll
        for (int subtile = 0; subtile < SUBTILES; subtile++) {
          const float2 rows0 = row_scales(my_scales + stage0 * SA_BYTES + subtile * SA_STRIDE);
          turns.take();
          multiply(acc0, stage0, subtile, !PROMOTE && k > 0);
          turns.give();
          const float b0 = __shfl_sync(~0u, batch0, k % 32), b1 = __shfl_sync(~0u, batch1, k % 32);
          wgmma_wait<0>();
          if (subtile == SUBTILES - 1) release(stage0);
          if (add0) promote_at(boundary, sum[subtile], acc0, rows0.x * b0, rows0.y * b0, rows0.x * b1, rows0.y * b1);
        }
      }
    }
    const int row = walk.row + warp * 16, valid_columns = N - column, count = walk.count;
    const long long first = (long long)(walk.first_row + row) * N + column;
    more = begin(unit += gridDim.x / 2);
    const u32 buffer = at.out + warp * (16 * OUT_ROW_BYTES);
#pragma unroll
    for (int subtile = 0; subtile < SUBTILES; subtile++) {
      const int down = subtile * (64 * WARPGROUPS), valid_rows = count - row - down;
      const long long to = first + (long long)down * N;
      if constexpr (OUT_FP32) {
        store_fp32(sum[subtile], (float*)d + to, valid_rows, valid_columns, N, lane);
      } else {
        store_bf16(sum[subtile], buffer, (u16*)d + to, valid_rows, valid_columns, N, lane);
      }
    }
  }
  turns.finish();
}

// a [rows, K], scale_a [K/128, rows], b [experts · N, K], scale_b [experts, N/128, K/128], d [rows, N]; counts is null
// for one expert with num_rows rows.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(128 + 128 * WARPGROUPS, 1)
    gemm_forward(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_sa,
                 const __grid_constant__ TensorMap map_b, const float* scale_b, void* d, const int* counts,
                 int num_rows, int num_experts, int N, int num_k) {
  extern __shared__ u8 raw[];
  Shared at;
  at.a = (shared_address(raw) + 1023) & ~1023u;  // the swizzle repeats every 1024 bytes
  at.b = at.a + STAGES * A_BYTES;
  at.scales = at.b + STAGES * B_BYTES;
  at.out = at.scales + STAGES * SA_BYTES;
  at.full = at.out + OUT_BYTES;
  at.empty = at.full + 8 * STAGES;
  const u32 rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(at.full + 8 * s, 1);
      barrier_init(at.empty + 8 * s, 2 * CONSUMER_WARPS);
    }
    barrier_init_done();
    prefetch_map(map_a), prefetch_map(map_sa), prefetch_map(map_b);
  }
  cluster_sync();
  const int num_pairs = (N + 2 * BN - 1) / (2 * BN);
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(WARPGROUPS == 2 ? 40 : 32));
    const Walk walk(counts, num_rows, num_experts, num_pairs);
    if (threadIdx.x == 0) produce(at, map_a, map_sa, map_b, walk, N, num_k, rank);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WARPGROUPS == 2 ? 232 : 160));
    const Walk walk(counts, num_rows, num_experts, num_pairs);
    consume(at, scale_b, d, walk, N, num_k, rank);
  }
  __syncwarp();
  cluster_sync();  // the other block may still write here
}
