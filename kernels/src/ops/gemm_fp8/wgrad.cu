// D[e][M, N] (+)= A[M, P] · B[N, P]ᵀ over the columns of expert e, both operands scaled 1×128 along P, FP32 out.
// Each expert's columns start on a tile of 128 and end in zeros. Follows hopper.cuh and wgmma().
//
// Defined from outside: WARPGROUPS, each with SUBTILES of 64 rows, BN columns of a tile, STAGES of the ring, ACCUMULATE, ORDERED (hopper.cuh).
//
// Clusters of two as in forward.cu. Both scales vary inside a tile, so a promotion costs a multiplication more for
// every element.
constexpr int BM = 64 * WARPGROUPS * SUBTILES, BK = 128, GROUP = 2048 / BM, CONSUMER_WARPS = 4 * WARPGROUPS;
constexpr bool PAIRED = SUBTILES == 1;  // as in forward.cu
constexpr int A_BYTES = BM * BK, B_BYTES = BN * BK, SA_BYTES = BM * 4, SB_BYTES = (BN * 4 + 127) / 128 * 128;
constexpr int STAGE_BYTES = A_BYTES + B_BYTES + SA_BYTES + BN * 4;

// Epilogue: each warp has a place for 16 rows of CHUNK columns, in boxes of 32 columns, swizzled over 128 bytes.
constexpr int CHUNK = SUBTILES == 1 && BN % 64 == 0 ? 64 : 32, BOX_BYTES = 16 * 32 * 4;
constexpr int OUT_BYTES = CONSUMER_WARPS * (CHUNK / 32) * BOX_BYTES;

struct Shared {
  u32 a, b, scales_a, scales_b, out, full, empty;
};

// Tiles expert by expert; within one, bands of GROUP tiles along M.
struct Walk {
  const int* counts;
  int num_rows, num_experts, num_tiles, num_pairs;
  int expert = 0, first_k = 0, num_k = 0;  // of the current expert, in tiles of 128 columns
  int row = 0, pair = 0;

  __device__ __forceinline__ Walk(const int* counts, int num_rows, int num_experts, int num_tiles, int num_pairs)
      : counts(counts), num_rows(num_rows), num_experts(num_experts), num_tiles(num_tiles), num_pairs(num_pairs) {
    num_k = tiles_of(0);
  }
  __device__ __forceinline__ int tiles_of(int expert) const {
    return ((counts ? load_count(counts + expert) : num_rows) + BK - 1) / BK;
  }
  __device__ __forceinline__ bool seek(int unit) {
    const int target = unit / (num_tiles * num_pairs);
    if (target >= num_experts) return false;
    while (expert < target) {
      first_k += num_k;
      num_k = tiles_of(++expert);
    }
    int local = unit - target * num_tiles * num_pairs;
    const int band = local / (GROUP * num_pairs), height = min(GROUP, num_tiles - band * GROUP);
    local -= band * GROUP * num_pairs;
    row = (band * GROUP + local % height) * BM;
    pair = local / height;
    return true;
  }
};

static __device__ __forceinline__ void produce(const Shared& at, const TensorMap& map_a, const TensorMap& map_sa,
                                               const TensorMap& map_b, const TensorMap& map_sb, Walk walk, u32 rank) {
  Ring<STAGES> ring;
  for (int unit = blockIdx.x / 2; walk.seek(unit); unit += gridDim.x / 2) {
    const int column = (2 * walk.pair + rank) * BN;
#pragma unroll 1
    for (int k = walk.first_k; k < walk.first_k + walk.num_k; k++, ring.next()) {
      const u32 full = at.full + 8 * ring.stage;
      barrier_wait(at.empty + 8 * ring.stage, ring.parity ^ 1);
      barrier_expect(full, STAGE_BYTES);
      const u32 half = rank * (A_BYTES / 2);
      load_box_for_both(at.a + ring.stage * A_BYTES + half, map_a, full, k * BK, walk.row + rank * (BM / 2));
      load_box(at.b + ring.stage * B_BYTES, map_b, full, k * BK, column);
      load_box(at.scales_a + ring.stage * SA_BYTES, map_sa, full, walk.row, k);
      load_box(at.scales_b + ring.stage * SB_BYTES, map_sb, full, column, k);
    }
  }
}

// Adds the products of one stage, each scaled by its row and its column.
static __device__ __forceinline__ void promote(float (&sum)[BN / 2], const float (&acc)[BN / 2], u32 scales_a,
                                               u32 scales_b) {
  float a0, a1;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(a0) : "r"(scales_a) : "memory");
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(a1) : "r"(scales_a + 32) : "memory");
#pragma unroll
  for (int j = 0; j < BN / 8; j++) {
    float b0, b1;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(b0), "=f"(b1) : "r"(scales_b + j * 32));
    sum[4 * j] += acc[4 * j] * (a0 * b0), sum[4 * j + 1] += acc[4 * j + 1] * (a0 * b1);
    sum[4 * j + 2] += acc[4 * j + 2] * (a1 * b0), sum[4 * j + 3] += acc[4 * j + 3] * (a1 * b1);
  }
}

// One warp's 16 rows at (column, row) of an expert: into shared memory, and from there through the copy engine, which adds
// them in L2 and leaves out what lies outside. One block owns each element of a launch, so the order of the sum is fixed.
static __device__ __forceinline__ void write(const float (&sum)[BN / 2], u32 buffer, const TensorMap& map_d, int column,
                                             int row, int expert, int lane) {
  const u32 upper = buffer + lane / 4 * 128 + lane % 2 * 8;
#pragma unroll
  for (int chunk = 0; chunk < BN; chunk += CHUNK) {
    if (lane == 0) boxes_read();
    __syncwarp();
#pragma unroll
    for (int j = 0; j < CHUNK / 8; j++) {
      const float* f = sum + (chunk / 8 + j) * 4;
      const u32 put = upper + j / 4 * BOX_BYTES + (((j % 4 * 2 + lane % 4 / 2) ^ lane / 4) << 4);
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(put), "f"(f[0]), "f"(f[1]) : "memory");
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(put + 8 * 128), "f"(f[2]), "f"(f[3]) : "memory");
    }
    fence_for_copies();
    __syncwarp();
    if (lane == 0) {
#pragma unroll
      for (int box = 0; box < CHUNK / 32; box++) {
        const u32 from = buffer + box * BOX_BYTES;
        const int x = column + chunk + box * 32;
        ACCUMULATE ? add_box(map_d, from, x, row, expert) : store_box(map_d, from, x, row, expert);
      }
      boxes_commit();
    }
  }
}

// PAIRED or SUBTILES as in forward.cu.
static __device__ __forceinline__ void consume(const Shared& at, const TensorMap& map_d, Walk walk, u32 rank) {
  const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
  const u32 my_scales_a = at.scales_a + (warp * 16 + lane / 4) * 4, my_scales_b = at.scales_b + lane % 4 * 8;
  const Turns turns(warp / 4);
  Ring<STAGES> ring;
  float sum[SUBTILES][BN / 2], acc0[BN / 2], acc1[BN / 2];
  auto multiply = [&](float(&acc)[BN / 2], u32 stage, int subtile) {
    const u64 a = matrix_descriptor(at.a + stage * A_BYTES + (subtile * WARPGROUPS + warp / 4) * (64 * BK));
    const u64 b = matrix_descriptor(at.b + stage * B_BYTES);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma(acc, a + 2 * step, b + 2 * step, step > 0);
    wgmma_commit();
  };
  auto add = [&](const float(&acc)[BN / 2], u32 stage, int subtile) {
    promote(sum[subtile], acc, my_scales_a + stage * SA_BYTES + subtile * (64 * WARPGROUPS * 4),
            my_scales_b + stage * SB_BYTES);
    if (subtile == SUBTILES - 1 && lane < 2) barrier_arrive(at.empty + 8 * stage, lane);
  };
  for (int unit = blockIdx.x / 2; walk.seek(unit); unit += gridDim.x / 2) {
#pragma unroll
    for (int i = 0; i < SUBTILES * (BN / 2); i++) sum[i / (BN / 2)][i % (BN / 2)] = 0;
    for (int k = 0; k < walk.num_k; k += PAIRED ? 2 : 1) {
      const u32 stage0 = ring.stage;
      barrier_wait(at.full + 8 * ring.stage, ring.parity);
      ring.next();
      if (PAIRED && k + 1 < walk.num_k) {
        turns.take();
        multiply(acc0, stage0, 0);
        const u32 stage1 = ring.stage;
        barrier_wait(at.full + 8 * ring.stage, ring.parity);
        ring.next();
        multiply(acc1, stage1, 0);
        turns.give();
        wgmma_wait<1>();
        add(acc0, stage0, 0);
        wgmma_wait<0>();
        add(acc1, stage1, 0);
      } else {
#pragma unroll
        for (int subtile = 0; subtile < SUBTILES; subtile++) {
          turns.take();
          multiply(acc0, stage0, subtile);
          turns.give();
          wgmma_wait<0>();
          add(acc0, stage0, subtile);
        }
      }
    }
    if (ACCUMULATE && walk.num_k == 0) continue;
    const int column = (2 * walk.pair + rank) * BN;
#pragma unroll
    for (int subtile = 0; subtile < SUBTILES; subtile++) {
      const int row = walk.row + subtile * (64 * WARPGROUPS) + warp * 16;
      write(sum[subtile], at.out + warp * (CHUNK / 32) * BOX_BYTES, map_d, column, row, walk.expert, lane);
    }
  }
  turns.finish();
  if (lane == 0) boxes_read();
}

// a [M, P], scale_a [P/128, M], b [N, P], scale_b [P/128, N], d [experts, M, N]; counts is null for one expert with
// num_rows columns.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(128 + 128 * WARPGROUPS, 1)
    gemm_wgrad(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_sa,
               const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_sb,
               const __grid_constant__ TensorMap map_d, const int* counts, int num_rows, int num_experts, int M, int N) {
  extern __shared__ u8 raw[];
  Shared at;
  at.a = (shared_address(raw) + 1023) & ~1023u;  // the swizzle repeats every 1024 bytes
  at.b = at.a + STAGES * A_BYTES;
  at.out = at.b + STAGES * B_BYTES;
  at.scales_a = at.out + OUT_BYTES;
  at.scales_b = at.scales_a + STAGES * SA_BYTES;
  at.full = at.scales_b + STAGES * SB_BYTES;
  at.empty = at.full + 8 * STAGES;
  const u32 rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(at.full + 8 * s, 1);
      barrier_init(at.empty + 8 * s, 2 * CONSUMER_WARPS);
    }
    barrier_init_done();
    prefetch_map(map_a), prefetch_map(map_sa), prefetch_map(map_b), prefetch_map(map_sb);
    prefetch_map(map_d);
  }
  cluster_sync();
  const int num_tiles = (M + BM - 1) / BM, num_pairs = (N + 2 * BN - 1) / (2 * BN);
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(WARPGROUPS == 2 ? 40 : 32));
    const Walk walk(counts, num_rows, num_experts, num_tiles, num_pairs);
    if (threadIdx.x == 0) produce(at, map_a, map_sa, map_b, map_sb, walk, rank);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WARPGROUPS == 2 ? 232 : 160));
    const Walk walk(counts, num_rows, num_experts, num_tiles, num_pairs);
    consume(at, map_d, walk, rank);
  }
  __syncwarp();
  cluster_sync();  // the other block may still write here
}
