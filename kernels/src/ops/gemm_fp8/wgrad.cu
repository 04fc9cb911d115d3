// D[e][M, N] (+)= A[M, P] · B[N, P]ᵀ over the columns of expert e, both operands scaled 1×128 along P, FP32 out.
// Each expert's columns start on a tile of 128 and end in zeros. A launch makes the gradients of those experts from `from_expert` to
// before `to_expert` that have `least` rows or more, and fewer than `most`. Follows hopper.cuh and wgmma().
//
// Defined from outside: BN columns of a tile, ALONG_M (the blocks of a cluster), STAGES of the ring, ACCUMULATE, RELOAD.
//
// Clusters of two as in forward.cu. Both scales vary inside a tile, so a promotion costs a multiplication more for
// every element.
constexpr int BM = 128, BK = 128, CONSUMER_WARPS = 8;
constexpr int HIGH = ALONG_M ? 2 : 1, WIDE = ALONG_M ? 1 : 2;  // tiles of a cluster
constexpr int GROUP = 2048 / (HIGH * BM);
constexpr int A_BYTES = BM * BK, B_BYTES = BN * BK, SA_BYTES = BM * 4, SB_BYTES = (BN * 4 + 127) / 128 * 128;
constexpr int STAGE_BYTES = A_BYTES + B_BYTES + SA_BYTES + BN * 4;

// Gradients are assigned, or added to in L2, straight from the registers. RELOAD, for experts of few rows, whose gradients are
// most of the traffic: in shared memory a place for the whole tile, in boxes of 32 columns swizzled over 128 bytes, into which
// a thread of its own reads the gradient while the tile is multiplied, and from where it writes the sum. All of a tile at once:
// memory is slower where reads and writes take turns more often.
constexpr int BOX_BYTES = BM * 32 * 4, OUT_BYTES = RELOAD ? BN / 32 * BOX_BYTES : 0;
static_assert(!RELOAD || (ACCUMULATE && BN % 32 == 0), "a tile is exchanged in boxes of 32 columns");
// Neighbours that a lane holds in every 4 · LANE columns. Four: the copy engine has put B's rows in such an order that a lane's
// pairs of 16 columns are 16 bytes.
constexpr int LANE = RELOAD ? 2 : 4;
constexpr bool AHEAD = !RELOAD;  // its ring is too short to look a stage ahead
// Were all clusters done with a tile at once, all would add to memory at once, and it would idle between. So most begin in the
// middle of their first tile, and end with its beginning.
constexpr int STARTS = ACCUMULATE && !RELOAD ? 4 : 1;

struct Shared {
  u32 a, b, scales_a, scales_b, out, full, empty, room, written;
};

// The experts, of which a launch takes some.
struct Experts {
  const int* counts;
  int num_rows, from, to, least, most;
  __device__ __forceinline__ int rows_of(int expert) const { return counts ? load_count(counts + expert) : num_rows; }
  __device__ __forceinline__ bool takes(int expert, int rows) const { return expert >= from && rows >= least && rows < most; }
  __device__ __forceinline__ int taken() const {
    int sum = 0;
#pragma unroll 8
    for (int expert = from; expert < to; expert++) sum += takes(expert, rows_of(expert));
    return sum;
  }
};

// Clusters' tiles expert by expert; within one, bands of GROUP of them along M.
struct Walk {
  Experts experts;
  int num_taken, num_tiles, num_columns;
  int expert = -1, place = -1, first_k = 0, num_k = 0;  // the current one, its place among those taken, its tiles of 128 columns
  int row = 0, column = 0;                              // of the cluster's tiles: the first row, the place along N
  int turn = -1, held = 0;                              // held: what was left of the first tile
  int from = 0, count = 0;                              // the part of num_k whose turn it is

  __device__ __forceinline__ Walk(Experts experts, int num_tiles, int num_columns)
      : experts(experts), num_taken(experts.taken()), num_tiles(num_tiles), num_columns(num_columns) {}
  __device__ __forceinline__ void seek(int unit) {
    const int target = quotient(unit, num_tiles * num_columns);
    for (; place < target; place++) {
      for (bool taken = false; !taken;) {
        const int rows = experts.rows_of(++expert);
        first_k += num_k, num_k = (rows + BK - 1) / BK, taken = experts.takes(expert, rows);
      }
    }
    for (; place > target; place--) {
      for (bool taken = false; !taken;) {
        const int rows = experts.rows_of(--expert);
        num_k = (rows + BK - 1) / BK, first_k -= num_k, taken = experts.takes(expert, rows);
      }
    }
    int local = unit - target * num_tiles * num_columns;
    const int band = quotient(local, GROUP * num_columns), height = min(GROUP, num_tiles - band * GROUP);
    local -= band * GROUP * num_columns;
    column = quotient(local, height);
    row = (band * GROUP + local - column * height) * (HIGH * BM);
  }
  __device__ __forceinline__ bool next() {
    const int mine = blockIdx.x / 2, unit = mine + ++turn * (gridDim.x / 2);
    const bool past = unit >= num_taken * num_tiles * num_columns;
    if (past && held == 0) return false;
    seek(past ? mine : unit);
    from = 0, count = past ? held : num_k, held = past ? 0 : held;
    if (turn == 0) held = from = num_k * (mine % STARTS) / STARTS, count -= from;
    return true;
  }
};

static __device__ __forceinline__ void produce(const Shared& at, const TensorMap& map_a, const TensorMap& map_sa,
                                               const TensorMap& map_b, const TensorMap& map_sb, Walk walk, u32 rank) {
  Ring<STAGES> ring;
  while (walk.next()) {
    const int row = walk.row + (ALONG_M ? rank * BM : 0), column = (WIDE * walk.column + (ALONG_M ? 0 : rank)) * BN;
#pragma unroll 1
    for (int k = walk.first_k + walk.from, left = walk.count; left > 0; k++, left--, ring.next()) {
      const u32 full = at.full + 8 * ring.stage, a = at.a + ring.stage * A_BYTES, b = at.b + ring.stage * B_BYTES;
      barrier_wait(at.empty + 8 * ring.stage, ring.parity ^ 1);
      barrier_expect(full, STAGE_BYTES);
      if (ALONG_M) {
        load_box(a, map_a, full, k * BK, row);
        load_rows<true, 4 * LANE>(b + rank * (B_BYTES / 2), map_b, full, k * BK, column + rank * (BN / 2));
      } else {
        load_box_for_both(a + rank * (A_BYTES / 2), map_a, full, k * BK, row + rank * (BM / 2));
        load_rows<false, 4 * LANE>(b, map_b, full, k * BK, column);
      }
      load_box(at.scales_a + ring.stage * SA_BYTES, map_sa, full, row, k);
      load_box(at.scales_b + ring.stage * SB_BYTES, map_sb, full, column, k);
    }
  }
  if (AHEAD) {  // the consumers' last look finds an empty stage
    barrier_wait(at.empty + 8 * ring.stage, ring.parity ^ 1);
    barrier_expect(at.full + 8 * ring.stage, 0);
  }
}

static __device__ __forceinline__ float load_one(u32 from) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(from) : "memory");
  return v;
}
// A lane's neighbours.
static __device__ __forceinline__ void load_lane(float (&v)[LANE], u32 from) {
  if constexpr (LANE == 4) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]) : "r"(from) : "memory");
  } else {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v[0]), "=f"(v[1]) : "r"(from) : "memory");
  }
}

// Two pairs of neighbours, where `inside`.
static __device__ __forceinline__ void write_lane(float* to, const float* low, const float* high, int inside) {
  if constexpr (ACCUMULATE) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n}" ::"l"(to),
                 "f"(low[0]), "f"(low[1]), "f"(high[0]), "f"(high[1]), "r"(inside)
                 : "memory");
  } else {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p st.global.v4.f32 [%0], {%1, %2, %3, %4};\n}" ::"l"(to),
                 "f"(low[0]), "f"(low[1]), "f"(high[0]), "f"(high[1]), "r"(inside)
                 : "memory");
  }
}

// Of a tile: a thread's first element in the gradient, and how many columns are left from there; none in rows outside of it.
struct Place {
  float* first;
  int upper, lower;
};

// A warp's 16 rows straight from its registers, without a wait: they are under way while the next products are made. One
// thread of a launch has each element, so the order of the sum is fixed.
static __device__ __forceinline__ void write(const float (&sum)[BN / 2], const Place& place, int N) {
  float* lower = place.first + 8LL * N;
#pragma unroll
  for (int column = 0; column < BN; column += 16) {
    const float* f = sum + column / 2;
    write_lane(place.first + column, f, f + 4, column < place.upper);
    write_lane(lower + column, f + 2, f + 6, column < place.lower);
  }
}

// RELOAD: one warp's 16 rows onto what lies in the tile's place, which `room` says is there.
static __device__ __forceinline__ void put(const float (&sum)[BN / 2], const Shared& at, int warp, int lane, u32 parity) {
  barrier_wait(at.room, parity);
#pragma unroll
  for (int i = 0; i < BN / 4; i++) {
    const int box = i / 8, group = i / 2 % 4, below = i % 2 * 8;
    const u32 row = at.out + box * BOX_BYTES + (warp * 16 + lane / 4 + below) * 128;
    const u32 to = row + (((group * 2 + lane % 4 / 2) ^ lane / 4) << 4) + lane % 2 * 8;
    float v[LANE];
    load_lane(v, to);
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(sum[2 * i] + v[0]), "f"(sum[2 * i + 1] + v[1]) : "memory");
  }
  fence_for_copies();
  __syncwarp();
  if (lane == 0) barrier_arrive_here(at.written);
}

// RELOAD: the thread that reads the gradient's tiles and writes them back.
static __device__ __forceinline__ void exchange(const Shared& at, const TensorMap& map_d, Walk walk, u32 rank) {
  u32 parity = 0;
  while (walk.next()) {
    if (walk.num_k == 0) continue;
    const int row = walk.row + (ALONG_M ? rank * BM : 0), column = (WIDE * walk.column + (ALONG_M ? 0 : rank)) * BN;
    barrier_expect(at.room, OUT_BYTES);
    for (int box = 0; box < BN / 32; box++) {
      read_box(at.out + box * BOX_BYTES, map_d, at.room, column + box * 32, row, walk.expert);
    }
    barrier_wait(at.written, parity), parity ^= 1;
    for (int box = 0; box < BN / 32; box++) store_box(map_d, at.out + box * BOX_BYTES, column + box * 32, row, walk.expert);
    boxes_commit();
    boxes_read();
  }
}

// sum += acc · scale(column) · scale(row), in runs that share a factor (sass.rs).
static __device__ __forceinline__ void promote(float (&sum)[BN / 2], float (&acc)[BN / 2], const float (&scales)[BN / 4 / LANE][LANE],
                                               float upper, float lower) {
#pragma unroll
  for (int i = 0; i < BN / 2; i += 4) {
    const float* of_pair = &scales[i / (2 * LANE)][i / 2 % LANE];
    acc[i] *= of_pair[0], acc[i + 2] *= of_pair[0];
    acc[i + 1] *= of_pair[1], acc[i + 3] *= of_pair[1];
  }
#pragma unroll
  for (int i = 0; i < BN / 2; i += 4) sum[i] += acc[i] * upper, sum[i + 1] += acc[i + 1] * upper;
#pragma unroll
  for (int i = 2; i < BN / 2; i += 4) sum[i] += acc[i] * lower, sum[i + 1] += acc[i + 1] * lower;
}

// As in forward.cu. The columns' scales are read before the multiplication starts: while it works, shared memory is busy. That
// is what is short: at 160 columns the matrix unit reads for 448 cycles of 128 of K, and the lanes, each its BN / 4 scales, for
// 340; the matrix unit works 640.
template <int WARPGROUP>
static __device__ __forceinline__ void consume(const Shared& at, float* d, int M, int N, Walk walk, u32 rank) {
  const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
  const u32 my_scales_a = at.scales_a + (warp * 16 + lane / 4) * 4, my_scales_b = at.scales_b + lane % 4 * (LANE * 4);
  u32 room_parity = 0;
  Stage<STAGES, A_BYTES, B_BYTES> stage(at.a + WARPGROUP * (64 * BK), at.b, at.full);
  float sum[BN / 2], acc[BN / 2];
  Place place = {d, 0, 0};  // of the tile before; none at first
  auto clear = [&]() {
#pragma unroll
    for (int i = 0; i < BN / 2; i++) sum[i] = 0;
  };
  auto begin_tile = [&]() {
    write(sum, place, N);
    clear();
    const int row = walk.row + (ALONG_M ? rank * BM : 0) + warp * 16 + lane / 4;
    const int column = (WIDE * walk.column + (ALONG_M ? 0 : rank)) * BN + lane % 4 * LANE;
    place = {d + ((long long)walk.expert * M + row) * N + column, row < M ? N - column : 0, row + 8 < M ? N - column : 0};
  };
  if (AHEAD) barrier_wait(stage.full, 0);
  while (walk.next()) {
    if (walk.num_k == 0) {
      if (!ACCUMULATE) begin_tile();
      continue;
    }
    if (RELOAD) clear();
#pragma unroll 1
    for (int left = walk.count; left > 0; left--) {
      if (!AHEAD) barrier_wait(stage.full, stage.parity);
      const u32 used = stage.full, from_a = my_scales_a + stage.index * SA_BYTES, from_b = my_scales_b + stage.index * SB_BYTES;
      const float upper = load_one(from_a), lower = load_one(from_a + 32);
      float scales[BN / 4 / LANE][LANE];
#pragma unroll
      for (int i = 0; i < BN / 4 / LANE; i++) load_lane(scales[i], from_b + i * (16 * LANE));
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; step++) wgmma(acc, matrix(stage.a + 2 * step), matrix(stage.b + 2 * step), step > 0);
      wgmma_commit();
      stage.next();
      if (!RELOAD && left == walk.count) begin_tile();
      if (AHEAD) barrier_wait(stage.full, stage.parity);
      wgmma_wait<0>();
      __syncwarp();  // all lanes have read the stage
      if (lane < 2) barrier_arrive(used + 8 * STAGES, lane);
      promote(sum, acc, scales, upper, lower);
    }
    if (RELOAD) put(sum, at, warp, lane, room_parity), room_parity ^= 1;
  }
  if (!RELOAD) write(sum, place, N);
}

// a [M, P], scale_a [P/128, M], b [N, P], scale_b [P/128, N], d [experts, M, N], by map_d too; counts is null for one expert
// with num_rows columns, and then has them all.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    gemm_wgrad(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_sa,
               const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_sb,
               const __grid_constant__ TensorMap map_d, float* d, const int* counts, int num_rows, int from_expert, int to_expert,
               int least, int most, int M, int N) {
  extern __shared__ u8 raw[];
  Shared at;
  at.a = (shared_address(raw) + 1023) & ~1023u;  // the swizzle repeats every 1024 bytes
  at.b = at.a + STAGES * A_BYTES;
  at.out = at.b + STAGES * B_BYTES;
  at.scales_a = at.out + OUT_BYTES;
  at.scales_b = at.scales_a + STAGES * SA_BYTES;
  at.full = at.scales_b + STAGES * SB_BYTES;
  at.empty = at.full + 8 * STAGES;
  at.room = at.empty + 8 * STAGES;
  at.written = at.room + 8;
  const u32 rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(at.full + 8 * s, 1);
      barrier_init(at.empty + 8 * s, 2 * CONSUMER_WARPS);
    }
    barrier_init(at.room, 1), barrier_init(at.written, CONSUMER_WARPS);
    barrier_init_done();
    prefetch_map(map_a), prefetch_map(map_sa), prefetch_map(map_b), prefetch_map(map_sb), prefetch_map(map_d);
  }
  cluster_sync();
  begin();
  const Experts experts = {counts, num_rows, from_expert, to_expert, least, most};
  const int num_tiles = (M + HIGH * BM - 1) / (HIGH * BM), num_columns = (N + WIDE * BN - 1) / (WIDE * BN);
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    const Walk walk(experts, num_tiles, num_columns);
    if (threadIdx.x == 0) produce(at, map_a, map_sa, map_b, map_sb, walk, rank);
    if (RELOAD && threadIdx.x == 32) exchange(at, map_d, walk, rank);
  } else if (threadIdx.x < 256) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const Walk walk(experts, num_tiles, num_columns);
    consume<0>(at, d, M, N, walk, rank);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const Walk walk(experts, num_tiles, num_columns);
    consume<1>(at, d, M, N, walk, rank);
  }
  __syncwarp();
  cluster_sync();  // the other block may still write here
}
