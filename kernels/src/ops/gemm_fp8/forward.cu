// D[M, N] = A[M, K] · B[N, K]ᵀ of FP8 operands, scaled 1×128 (A) and 128×128 (B); rows of several experts lie one
// after another, each with its own B. Follows hopper.cuh and wgmma().
//
// Defined from outside: SUBTILES of 64 rows for each of the two warpgroups, BN columns of a tile, ALONG_M (the blocks of
// a cluster), STAGES of the ring, OUT_FP32 (else BF16), INTERLEAVED (the columns of a tile, see write), PROMOTE (0 shows
// what the promotion is for).
//
// Persistent clusters of two blocks: the two compute neighbouring tiles, along N or along M, and each loads half of what
// they share, of A or of B, for both. A producer thread fills the ring; the warpgroups multiply, and add every 128 of K
// into FP32.
constexpr int BM = 128 * SUBTILES, BK = 128, CONSUMER_WARPS = 8;
constexpr int HIGH = ALONG_M ? 2 : 1, WIDE = ALONG_M ? 1 : 2;  // tiles of a cluster
constexpr int GROUP = (ALONG_M ? 2048 : 4096) / (HIGH * BM);
// The copy engine starts on 16 bytes, an expert's rows on any: four scales more than rows. A box has 256 at most.
constexpr int SA_LOAD = (128 + 4) * 4, SA_STRIDE = (SA_LOAD + 127) / 128 * 128;
constexpr int SA_BYTES = SUBTILES * SA_STRIDE, A_BYTES = BM * BK, B_BYTES = BN * BK;
constexpr int NOTE = SA_LOAD;  // what the producer says of a stage lies after its first scales
static_assert(NOTE + 20 <= SA_STRIDE, "the note has its place");
constexpr int STAGE_BYTES = A_BYTES + B_BYTES + SUBTILES * SA_LOAD;
// A tile meets two B scales at most; the boundary lies on a multiple of STEP groups of eight columns.
static __device__ constexpr int gcd(int a, int b) { return b ? gcd(b, a % b) : a; }
constexpr int STEP = gcd(BN, 128) / 8;
constexpr int GROUP_OF_B = INTERLEAVED ? 32 : 8;
constexpr bool ONE_SCALE = 128 % BN == 0;
static_assert(STEP % 4 == 0 && 128 - 8 * STEP + BN <= 256, "a tile may meet two B scales, not three");

struct Shared {
  u32 a, b, scales, full, empty;
};

// Clusters' tiles in the order in which they are computed: expert by expert, bands of GROUP of them along M (they share
// B in L2). A last tile whose second subtile has no rows takes half the time: such tiles are a band of their own, and where there
// are experts, clusters take every other round of tiles from its end, or the same few would get most of them.
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
    int local = unit - first_unit;
    const int whole = tiles() - (SUBTILES == 2 && !ALONG_M && count - (tiles() - 1) * BM <= BM / 2);
    if (local >= whole * num_columns) {
      row = whole * BM, column = local - whole * num_columns;
      return true;
    }
    const int band = quotient(local, GROUP * num_columns), height = min(GROUP, whole - band * GROUP);
    local -= band * GROUP * num_columns;
    column = quotient(local, height);
    row = (band * GROUP + local - column * height) * (HIGH * BM);
    return true;
  }
  // Of this block's tile.
  __device__ __forceinline__ int tile_row(u32 rank) const { return row + (ALONG_M ? rank * BM : 0); }
  __device__ __forceinline__ int tile_column(u32 rank) const { return (WIDE * column + (ALONG_M ? 0 : rank)) * BN; }
};

// sum += acc · scale(row) · scale(column): s[0] before the boundary, s[1] from there on, x for the upper row of the two.
static __device__ __forceinline__ void promote(float (&sum)[BN / 2], const float (&acc)[BN / 2], const float2 (&s)[2],
                                               int boundary) {
  float2 scale = s[0];
#pragma unroll
  for (int j = 0; j < BN / 8; j++) {
    if (!ONE_SCALE && j % STEP == 0 && j > 0 && j >= boundary) scale = s[1];
    sum[4 * j] += acc[4 * j] * scale.x;
    sum[4 * j + 1] += acc[4 * j + 1] * scale.x;
    sum[4 * j + 2] += acc[4 * j + 2] * scale.y;
    sum[4 * j + 3] += acc[4 * j + 3] * scale.y;
  }
}

// A warp's 16 rows straight from its registers, without a wait: the stores are under way while the next products are
// made. A lane holds pairs of neighbours, of every fourth pair of columns. INTERLEAVED, the copy engine has put B's rows
// in such an order that the pairs of 32 columns are eight neighbours: 16 bytes a lane, 64 a row.
static __device__ __forceinline__ void write(const float (&sum)[BN / 2], void* d, int row, int end_row, int column, int N,
                                             int lane) {
  constexpr int PAIRS = INTERLEAVED ? 4 : 1;
#pragma unroll
  for (int i = 0; i < BN / 4; i += PAIRS) {
    // Pairs of the upper row, then of the lower.
    const int first = i / (2 * PAIRS) * (4 * PAIRS) + i / PAIRS % 2 * 2;
    const float* f = sum + first;
    const int m = row + lane / 4 + i / PAIRS % 2 * 8, n = column + first / 4 * 8 + lane % 4 * (2 * PAIRS);
    const int inside = m < end_row && n < N;
    const long long place = (long long)m * N + n;
    if constexpr (INTERLEAVED) {
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p st.global.v4.b32 [%0], {%1, %2, %3, %4};\n}" ::"l"(
                       (u16*)d + place),
                   "r"(bf16_pair(f[0], f[1])), "r"(bf16_pair(f[4], f[5])), "r"(bf16_pair(f[8], f[9])),
                   "r"(bf16_pair(f[12], f[13])), "r"(inside)
                   : "memory");
    } else if (OUT_FP32) {
      if (inside) *(float2*)((float*)d + place) = make_float2(f[0], f[1]);
    } else {
      if (inside) *(u32*)((u16*)d + place) = bf16_pair(f[0], f[1]);
    }
  }
}

// The producer walks over the tiles and says in each stage, after the scales of A, what the consumers want to know of it. The
// copies of values, which take longest, are under way before.
static __device__ __forceinline__ void put_note(u32 at, float b0, float b1, int row, int end_row, int column) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(b0), "f"(b1) : "memory");
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at + 8), "r"(row), "r"(end_row) : "memory");
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at + 16), "r"(column) : "memory");
}

static __device__ __forceinline__ void produce(const Shared& at, const TensorMap& map_a, const TensorMap& map_sa,
                                               const TensorMap& map_b, const float* scale_b, Walk walk, int N,
                                               int num_k, u32 rank) {
  const int blocks_n = (N + 127) / 128;
  Ring<STAGES> ring;
  // From a place of a round to that of the next one.
  const int clusters = gridDim.x / 2;
  int skew = walk.counts ? clusters - 1 - (int)(blockIdx.x / 2) * 2 : 0;
  for (int unit = blockIdx.x / 2; walk.seek(unit); unit += clusters + skew, skew = -skew) {
    const int row = walk.first_row + walk.tile_row(rank), column = walk.tile_column(rank);
    const int block = min(column / 128, blocks_n - 1), b_row = walk.expert * N + column;
    const float* b = scale_b + (long long)(walk.expert * blocks_n + block) * num_k;
    const int other = block + 1 < blocks_n ? num_k : 0;
    float b0 = __ldg(b), b1 = __ldg(b + other);
#pragma unroll 1
    for (int k = 0; k < num_k; k++, ring.next()) {
      const u32 full = at.full + 8 * ring.stage, a = at.a + ring.stage * A_BYTES, to_b = at.b + ring.stage * B_BYTES;
      const u32 scales = at.scales + ring.stage * SA_BYTES;
      barrier_wait(at.empty + 8 * ring.stage, ring.parity ^ 1);
      barrier_expect_bytes(full, STAGE_BYTES);
      if (ALONG_M) {
        load_box(a, map_a, full, k * BK, row);
        load_rows<true, GROUP_OF_B>(to_b + rank * (B_BYTES / 2), map_b, full, k * BK, b_row + rank * (BN / 2));
      } else {
        load_box_for_both(a + rank * (A_BYTES / 2), map_a, full, k * BK, row + rank * (BM / 2));
        load_rows<false, GROUP_OF_B>(to_b, map_b, full, k * BK, b_row);
      }
      put_note(scales + NOTE, b0, b1, row, walk.first_row + walk.count, column);
      barrier_arrive_here(full);
      for (int i = 0; i < SUBTILES; i++) load_box(scales + i * SA_STRIDE, map_sa, full, (row & ~3) + i * 128, k);
      b++;
      if (k + 1 < num_k) b0 = __ldg(b), b1 = __ldg(b + other);
    }
  }
  // The consumers look one stage ahead: their last look finds an empty one.
  barrier_wait(at.empty + 8 * ring.stage, ring.parity ^ 1);
  put_note(at.scales + ring.stage * SA_BYTES + NOTE, 0, 0, 0, 0, -1);
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
// must be shorter than one, or the matrix unit idles: while it works, the next stage is awaited and its scales are read,
// and a tile that is complete is written; addresses are carried along instead of computed. WARPGROUP is a template
// argument so that they lie in the uniform registers, where the matrix instructions take them from; a return or a branch
// on what differs between lanes would drive them out.
template <int WARPGROUP>
static __device__ __forceinline__ void consume(const Shared& at, void* d, int N, int num_k) {
  const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
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
  // The tile at hand, none at first, and the next one.
  int row = 0, end_row = 0, column = 0, next_row, next_end, next_column;
  bool more, half;  // is there a next one, and lie all its rows in the first subtiles
  auto read_tile = [&]() {
    const u32 note = at.scales + stage.index * SA_BYTES + NOTE;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(next_row), "=r"(next_end) : "r"(note + 8) : "memory");
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(next_column) : "r"(note + 16) : "memory");
    more = __shfl_sync(~0u, next_column, 0) >= 0;
    half = SUBTILES == 2 && __shfl_sync(~0u, next_end - next_row, 0) <= 128;
  };
  float2 rows[SUBTILES], b;
  const u32 my_row = at.scales + (warp * 16 + lane / 4) * 4;
  auto read_scales = [&](int tile_row) {
    const u32 from = stage.index * SA_BYTES;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(b.x), "=f"(b.y) : "r"(at.scales + from + NOTE) : "memory");
#pragma unroll
    for (int i = 0; i < SUBTILES; i++) rows[i] = row_scales(my_row + from + i * SA_STRIDE + (tile_row & 3) * 4);
  };
  auto write_tile = [&](int subtile) {
    write(sum[subtile], d, row + warp * 16 + subtile * 128, end_row, column, N, lane);
  };
  barrier_wait(stage.full, 0);
  read_tile();
  read_scales(next_row);
  auto compute = [&](int filled) __attribute__((always_inline)) {
#pragma unroll 1
    for (int k = 0; k < num_k; k++) {
#pragma unroll
      for (int subtile = 0; subtile < filled; subtile++) {
        const float2 scale = rows[subtile], s[2] = {{scale.x * b.x, scale.y * b.x}, {scale.x * b.y, scale.y * b.y}};
        const u32 used = stage.full;
        multiply(subtile, !PROMOTE && k > 0);
        if (subtile == 0 && k == 0) {
          write_tile(SUBTILES - 1);  // of the tile before
#pragma unroll
          for (int i = 0; i < SUBTILES * (BN / 2); i++) sum[i / (BN / 2)][i % (BN / 2)] = 0;
          row = next_row, end_row = next_end, column = next_column;
        }
        if (subtile == filled - 1) {
          if (filled == 2 && k + 1 == num_k) write_tile(0);
          stage.next();
          barrier_wait(stage.full, stage.parity);
          if (k + 1 == num_k) read_tile();
          read_scales(k + 1 == num_k ? next_row : row);
        }
        wgmma_wait<0>();
        if (subtile == filled - 1) {
          __syncwarp();  // all lanes have read the stage
          if (lane < 2) barrier_arrive(used + 8 * STAGES, lane);
        }
        if (PROMOTE || k + 1 == num_k) promote(sum[subtile], acc, s, (128 - column % 128) / 8);
      }
    }
    if (filled < SUBTILES) write_tile(0);
  };
  while (more) {
    if (half) {
      compute(1);
    } else {
      compute(SUBTILES);
    }
  }
  write_tile(SUBTILES - 1);
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
  at.full = at.scales + STAGES * SA_BYTES;
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
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    const Walk walk(counts, num_rows, num_experts, (N + WIDE * BN - 1) / (WIDE * BN));
    if (threadIdx.x == 0) produce(at, map_a, map_sa, map_b, scale_b, walk, N, num_k, rank);
  } else if (threadIdx.x < 256) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume<0>(at, d, N, num_k);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume<1>(at, d, N, num_k);
  }
  __syncwarp();
  cluster_sync();  // the other block may still write here
}
