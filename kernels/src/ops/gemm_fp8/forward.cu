// D[M, N] = A[M, K] · B[N, K]ᵀ of FP8 operands, scaled 1×128 (A) and 128×128 (B); rows of several experts lie one
// after another, each with its own B. Follows hopper.cuh and wgmma().
//
// Defined from outside: SUBTILES of 64 rows for each of the two warpgroups, BN columns of a tile, ALONG_M (the blocks of
// a cluster), STAGES of the ring, OUT_FP32 (else BF16), PROMOTE (0 shows what the promotion is for).
//
// Persistent clusters of two blocks: the two compute neighbouring tiles, along N or along M, and each loads half of what
// they share, of A or of B, for both. A producer thread fills the ring; the warpgroups multiply, and add every 128 of K
// into FP32.
constexpr int BM = 128 * SUBTILES, BK = 128, CONSUMER_WARPS = 8;
constexpr int HIGH = ALONG_M ? 2 : 1, WIDE = ALONG_M ? 1 : 2;  // tiles of a cluster
constexpr int GROUP = 4096 / (HIGH * BM);
// The copy engine starts on 16 bytes, an expert's rows on any: four scales more than rows. A box has 256 at most.
constexpr int SA_LOAD = (128 + 4) * 4, SA_STRIDE = (SA_LOAD + 127) / 128 * 128;
constexpr int SA_BYTES = SUBTILES * SA_STRIDE, A_BYTES = BM * BK, B_BYTES = BN * BK;
constexpr int STAGE_BYTES = A_BYTES + B_BYTES + SUBTILES * SA_LOAD;
// Epilogue: each warp turns 16 rows × 8·CHUNK columns at a time; 16 bytes of padding keep the banks apart.
constexpr int CHUNK = BN % 64 == 0 ? 8 : 4, OUT_ROW_BYTES = CHUNK * 16 + 16;
constexpr int OUT_BYTES = CONSUMER_WARPS * 16 * OUT_ROW_BYTES;
// A tile meets two B scales at most; the boundary lies on a multiple of STEP groups of eight columns.
static __device__ constexpr int gcd(int a, int b) { return b ? gcd(b, a % b) : a; }
constexpr int STEP = gcd(BN, 128) / 8;
constexpr bool ONE_SCALE = 128 % BN == 0;
static_assert(BN % 8 == 0 && 128 - 8 * STEP + BN <= 256, "a tile may meet two B scales, not three");

struct Shared {
  u32 a, b, scales, out, full, empty;
};

// Clusters' tiles in the order in which they are computed: expert by expert, bands of GROUP of them along M (they share
// B in L2).
struct Walk {
  const int* counts;
  int num_rows, num_experts, num_columns;
  int expert = 0, first_row = 0, count = 0, first_unit = 0;
  int row = 0, column = 0;  // of the current cluster's tiles: its first row within the expert, its place along N

  __device__ __forceinline__ Walk(const int* counts, int num_rows, int num_experts, int num_columns)
      : counts(counts), num_rows(num_rows), num_experts(num_experts), num_columns(num_columns) {
    count = rows_of(0);
  }
  __device__ __forceinline__ int rows_of(int expert) const { return counts ? load_count(counts + expert) : num_rows; }
  __device__ __forceinline__ int tiles() const { return (count + HIGH * BM - 1) / (HIGH * BM); }
  __device__ __forceinline__ bool seek(int unit) {
    while (unit >= first_unit + tiles() * num_columns) {
      first_unit += tiles() * num_columns;
      first_row += count;
      if (++expert == num_experts) return false;
      count = rows_of(expert);
    }
    int local = unit - first_unit, band = local / (GROUP * num_columns);
    const int height = min(GROUP, tiles() - band * GROUP);
    local -= band * GROUP * num_columns;
    row = (band * GROUP + local % height) * (HIGH * BM);
    column = local / height;
    return true;
  }
};

// sum += acc · scale(row) · scale(column): s[0] before the boundary, s[1] from there on, x for the upper row of the two.
static __device__ __forceinline__ void promote(float (&sum)[BN / 2], const float (&acc)[BN / 2], const float2 (&s)[2],
                                               int boundary) {
  float2 scale = s[0];
#pragma unroll
  for (int j = 0; j < BN / 8; j++) {
    if (!ONE_SCALE && j % STEP == 0 && j > 0 && j <= 16 && j >= boundary) scale = s[1];
    sum[4 * j] += acc[4 * j] * scale.x;
    sum[4 * j + 1] += acc[4 * j + 1] * scale.x;
    sum[4 * j + 2] += acc[4 * j + 2] * scale.y;
    sum[4 * j + 3] += acc[4 * j + 3] * scale.y;
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
    const int row = walk.first_row + walk.row + (ALONG_M ? rank * BM : 0);
    const int column = walk.expert * N + (WIDE * walk.column + (ALONG_M ? 0 : rank)) * BN;
#pragma unroll 1
    for (int k = 0; k < num_k; k++, ring.next()) {
      const u32 full = at.full + 8 * ring.stage, a = at.a + ring.stage * A_BYTES, b = at.b + ring.stage * B_BYTES;
      barrier_wait(at.empty + 8 * ring.stage, ring.parity ^ 1);
      barrier_expect(full, STAGE_BYTES);
      if (ALONG_M) {
        load_box(a, map_a, full, k * BK, row);
        load_box_for_both(b + rank * (B_BYTES / 2), map_b, full, k * BK, column + rank * (BN / 2));
      } else {
        load_box_for_both(a + rank * (A_BYTES / 2), map_a, full, k * BK, row + rank * (BM / 2));
        load_box(b, map_b, full, k * BK, column);
      }
      for (int i = 0; i < SUBTILES; i++) {
        load_box(at.scales + ring.stage * SA_BYTES + i * SA_STRIDE, map_sa, full, (row & ~3) + i * 128, k);
      }
    }
  }
  // The consumers look one stage ahead: their last look finds an empty one.
  barrier_wait(at.empty + 8 * ring.stage, ring.parity ^ 1);
  barrier_expect(at.full + 8 * ring.stage, 0);
}

// The scales of this thread's two rows in one stage.
static __device__ __forceinline__ float2 row_scales(u32 from) {
  float2 scales;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(scales.x) : "r"(from) : "memory");
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(scales.y) : "r"(from + 32) : "memory");
  return scales;
}

// While one warpgroup adds up its products, the other's are made. All that a warpgroup does between two multiplications
// must be shorter than one, or the matrix unit idles: the next stage is awaited and its scales are read while it works,
// and addresses are carried along instead of computed. WARPGROUP is a template argument so that they lie in the uniform
// registers, where the matrix instructions take them from.
template <int WARPGROUP>
static __device__ __forceinline__ void consume(const Shared& at, const float* scale_b, void* d, Walk walk, int N,
                                               int num_k, u32 rank) {
  const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32, blocks_n = (N + 127) / 128;
  float sum[SUBTILES][BN / 2], acc[BN / 2];
  Stage<STAGES, A_BYTES, B_BYTES> stage(at.a + WARPGROUP * (64 * BK), at.b, at.full);
  auto multiply = [&](int subtile, bool add) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++) {
      wgmma(acc, matrix(stage.a + subtile * (128 * BK / 16) + 2 * step), matrix(stage.b + 2 * step), step > 0 || add);
    }
    wgmma_commit();
  };
  // A lane holds B's scales of one K tile in 32; the next batch, or the next tile's first, is on its way.
  const float *scale0, *scale1;
  float batch0 = 0, batch1 = 0, ahead0, ahead1 = 0;
  auto fetch = [&](int k) {
    ahead0 = __ldg(scale0 + min(k + lane, num_k - 1));
    if (!ONE_SCALE) ahead1 = __ldg(scale1 + min(k + lane, num_k - 1));
  };
  auto column_of = [&]() { return (WIDE * walk.column + (ALONG_M ? 0 : rank)) * BN; };
  auto begin_tile = [&](int unit) {
    if (!walk.seek(unit)) return false;
    const int block = min(column_of() / 128, blocks_n - 1), next_block = min(block + 1, blocks_n - 1);
    scale0 = scale_b + (long long)(walk.expert * blocks_n + block) * num_k;
    scale1 = scale_b + (long long)(walk.expert * blocks_n + next_block) * num_k;
    fetch(0);
    return true;
  };
  int unit = blockIdx.x / 2;
  barrier_wait(stage.full, 0);
  for (bool more = begin_tile(unit); more;) {
    const int tile_row = walk.row + (ALONG_M ? rank * BM : 0), column = column_of(), boundary = (128 - column % 128) / 8;
    const u32 my_scales = at.scales + (warp * 16 + lane / 4 + ((walk.first_row + tile_row) & 3)) * 4;
    float2 rows[SUBTILES];
    float b0, b1 = 0;
    auto read_scales = [&](int k) {
#pragma unroll
      for (int i = 0; i < SUBTILES; i++) rows[i] = row_scales(my_scales + stage.index * SA_BYTES + i * SA_STRIDE);
      if (k % 32 == 0) batch0 = ahead0, batch1 = ahead1, fetch(k + 32);
      b0 = __shfl_sync(~0u, batch0, k % 32);
      if (!ONE_SCALE) b1 = __shfl_sync(~0u, batch1, k % 32);
    };
    read_scales(0);
#pragma unroll
    for (int i = 0; i < SUBTILES * (BN / 2); i++) sum[i / (BN / 2)][i % (BN / 2)] = 0;
#pragma unroll 1
    for (int k = 0; k < num_k; k++) {
#pragma unroll
      for (int subtile = 0; subtile < SUBTILES; subtile++) {
        const float2 row = rows[subtile], s[2] = {{row.x * b0, row.y * b0}, {row.x * b1, row.y * b1}};
        const u32 used = stage.full;
        multiply(subtile, !PROMOTE && k > 0);
        if (subtile == SUBTILES - 1) {
          stage.next();
          barrier_wait(stage.full, stage.parity);
          read_scales(k + 1);
        }
        wgmma_wait<0>();
        if (subtile == SUBTILES - 1 && lane < 2) barrier_arrive(used + 8 * STAGES, lane);
        if (PROMOTE || k + 1 == num_k) promote(sum[subtile], acc, s, boundary);
      }
    }
    const int row = tile_row + warp * 16, valid_columns = N - column, count = walk.count;
    const long long first = (long long)(walk.first_row + row) * N + column;
    more = begin_tile(unit += gridDim.x / 2);
    const u32 buffer = at.out + warp * (16 * OUT_ROW_BYTES);
#pragma unroll
    for (int subtile = 0; subtile < SUBTILES; subtile++) {
      const int down = subtile * 128, valid_rows = count - row - down;
      const long long to = first + (long long)down * N;
      if constexpr (OUT_FP32) {
        store_fp32(sum[subtile], (float*)d + to, valid_rows, valid_columns, N, lane);
      } else {
        store_bf16(sum[subtile], buffer, (u16*)d + to, valid_rows, valid_columns, N, lane);
      }
    }
  }
}

// a [rows, K], scale_a [K/128, rows], b [experts · N, K], scale_b [experts, N/128, K/128], d [rows, N]; counts is null
// for one expert with num_rows rows.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
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
  begin();
  const int num_columns = (N + WIDE * BN - 1) / (WIDE * BN);
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    const Walk walk(counts, num_rows, num_experts, num_columns);
    if (threadIdx.x == 0) produce(at, map_a, map_sa, map_b, walk, N, num_k, rank);
  } else if (threadIdx.x < 256) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const Walk walk(counts, num_rows, num_experts, num_columns);
    consume<0>(at, scale_b, d, walk, N, num_k, rank);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const Walk walk(counts, num_rows, num_experts, num_columns);
    consume<1>(at, scale_b, d, walk, N, num_k, rank);
  }
  __syncwarp();
  cluster_sync();  // the other block may still write here
}
