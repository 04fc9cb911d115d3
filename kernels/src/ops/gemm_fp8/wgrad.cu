// D[e][M, N] (+)= A[M, P] · B[N, P]ᵀ over the columns of expert e, both operands scaled 1×128 along P, FP32 out.
// Each expert's columns start on a tile of 128 and end in zeros. Follows hopper.cuh and wgmma().
//
// Defined from outside: BN columns of a tile, SUBTILES, ALONG_M (the blocks of a cluster), STAGES of the ring, ACCUMULATE,
// RELOAD.
//
// Clusters of two as in forward.cu. Both scales vary inside a tile, so a promotion costs a multiplication more for every
// element, and a thread needs a fourth of the columns' scales for each 128 of P. What bounds the loop is shared memory: the
// matrix unit reads 24 KiB for 64×128×128 products, the copies write 24 KiB for as many of a tile of 256 rows. So scales
// come at half the size, and once for both subtiles (pack below).
constexpr int BM = 128 * SUBTILES, BK = 128, CONSUMER_WARPS = 8;
constexpr int HIGH = ALONG_M ? 2 : 1, WIDE = ALONG_M ? 1 : 2;  // tiles of a cluster
constexpr int GROUP = 2048 / (HIGH * BM);
constexpr int A_BYTES = BM * BK, B_BYTES = BN * BK, SA_BYTES = BM * 4, SB_BYTES = (BN * 4 + 127) / 128 * 128;
constexpr int STAGE_BYTES = A_BYTES + B_BYTES + SA_BYTES + BN * 4;
constexpr int QUARTER_BYTES = (BN / 8 + 4) * 4;  // packed scales of a thread's columns, and a pad for the banks

// Epilogue, in boxes of 32 columns swizzled over 128 bytes. Else each warp has a place for a box of 16 rows, sent at once to
// be added in L2. RELOAD, for experts of few rows, whose gradients are most of the traffic: a place for the whole tile,
// into which a thread of its own reads the gradient while the tile is multiplied, and from where it writes the sum.
constexpr int BOX_ROWS = RELOAD ? BM : 16, BOX_BYTES = BOX_ROWS * 32 * 4;
constexpr int OUT_BYTES = RELOAD ? BN / 32 * BOX_BYTES : CONSUMER_WARPS * BOX_BYTES;
static_assert(BN % 32 == 0 && (!RELOAD || SUBTILES == 1), "a tile is written in boxes of 32 columns, a reloaded one whole");
constexpr bool AHEAD = !RELOAD;  // its ring is too short to look a stage ahead
// One warpgroup's products after the other's: while one adds up, the other's are made. Else both may do the same at once.
constexpr bool TURNS = SUBTILES == 2;
// Were all clusters done with a tile at once, all would write at once, and memory would idle between. So most begin in the
// middle of their first tile, and end with its beginning.
constexpr int STARTS = RELOAD ? 1 : 4;
constexpr int PARTS = 16;  // more than the stages that the producer may be ahead

struct Shared {
  u32 a, b, scales_a, scales_b, packed, out, full, ready, empty, room, written, parts;
};

// What the producer says of a tile, or of a part of its products: the first row and column, and how many stages follow. A tile
// with NOTHING to multiply takes a stage too.
struct Part {
  int row, column, expert, count;
  bool adds;  // to what the tile's other part has assigned
};
constexpr int NOTHING = 0, END = -1;

static __device__ __forceinline__ uint4 load_four(u32 from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
  return v;
}
static __device__ __forceinline__ void put_part(const Shared& at, int slot, Part part) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at.parts + slot * 16), "r"(part.row), "r"(part.column),
               "r"(part.expert * 2 + part.adds), "r"(part.count)
               : "memory");
}
static __device__ __forceinline__ Part part_of(const Shared& at, int slot) {
  const uint4 v = load_four(at.parts + slot * 16);
  return {(int)v.x, (int)v.y, (int)(v.z / 2), (int)v.w, v.z % 2 == 1};
}

// Clusters' tiles expert by expert; within one, bands of GROUP of them along M.
struct Walk {
  const int* counts;
  int num_rows, num_experts, num_tiles, num_columns;
  int expert = 0, first_k = 0, num_k = 0;  // of the current expert, in tiles of 128 columns
  int row = 0, column = 0;                 // of the cluster's tiles: the first row, the place along N

  __device__ __forceinline__ Walk(const int* counts, int num_rows, int num_experts, int num_tiles, int num_columns)
      : counts(counts), num_rows(num_rows), num_experts(num_experts), num_tiles(num_tiles), num_columns(num_columns) {
    num_k = tiles_of(0);
  }
  __device__ __forceinline__ int tiles_of(int expert) const {
    return ((counts ? load_count(counts + expert) : num_rows) + BK - 1) / BK;
  }
  __device__ __forceinline__ bool seek(int unit) {
    const int target = unit / (num_tiles * num_columns);
    if (target >= num_experts) return false;
    if (target < expert) expert = first_k = 0, num_k = tiles_of(0);
    while (expert < target) {
      first_k += num_k;
      num_k = tiles_of(++expert);
    }
    int local = unit - target * num_tiles * num_columns;
    const int band = local / (GROUP * num_columns), height = min(GROUP, num_tiles - band * GROUP);
    local -= band * GROUP * num_columns;
    row = (band * GROUP + local % height) * (HIGH * BM);
    column = local / height;
    return true;
  }
};

static __device__ __forceinline__ void produce(const Shared& at, const TensorMap& map_a, const TensorMap& map_sa,
                                               const TensorMap& map_b, const TensorMap& map_sb, Walk walk, u32 rank) {
  Ring<STAGES> ring;
  const int step = gridDim.x / 2, mine = blockIdx.x / 2;
  int slot = 0, held = 0;  // held: what was left of the first tile
  bool last = false;
#pragma unroll 1
  for (int unit = mine; !last; unit += step) {
    if (!walk.seek(unit)) {
      if (held == 0) break;
      last = walk.seek(mine);
    }
    int from = 0, to = last ? held : walk.num_k;
    if (unit == mine) held = from = to * (mine % STARTS) / STARTS;
    if (ACCUMULATE && to == 0) continue;
    const int row = walk.row + (ALONG_M ? rank * BM : 0), column = (WIDE * walk.column + (ALONG_M ? 0 : rank)) * BN;
    barrier_wait(at.empty + 8 * ring.stage, ring.parity ^ 1);
    put_part(at, slot, {row, column, walk.expert, to - from, last}), slot = (slot + 1) % PARTS;
    if (to == 0) barrier_expect(at.full + 8 * ring.stage, 0), ring.next();
#pragma unroll 1
    for (int k = walk.first_k + from; k < walk.first_k + to; k++, ring.next()) {
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
      load_box(at.scales_a + ring.stage * SA_BYTES, map_sa, full, row, k);
      load_box(at.scales_b + ring.stage * SB_BYTES, map_sb, full, column, k);
    }
  }
  barrier_wait(at.empty + 8 * ring.stage, ring.parity ^ 1);
  put_part(at, slot, {0, 0, 0, END, false});
  barrier_expect(at.full + 8 * ring.stage, 0);
}

// Until the boxes that this thread sent are written.
static __device__ __forceinline__ void boxes_written() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

static __device__ __forceinline__ float load_one(u32 from) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(from) : "memory");
  return v;
}
static __device__ __forceinline__ float2 load_two(u32 from) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(from) : "memory");
  return v;
}

// One warp makes of each stage's scales of columns pairs of BF16, a thread's together. Nothing is lost: such a scale is a power
// of two, or a magnitude of BF16 over 448, which is taken out here and put back with the rows' scales.
static __device__ __forceinline__ void pack(const Shared& at) {
  const int lane = threadIdx.x % 32;
  int slot = 0, left = 0;
  for (Ring<STAGES> ring;; ring.next()) {
    barrier_wait(at.full + 8 * ring.stage, ring.parity);
    if (left <= 0) left = part_of(at, slot).count, slot = (slot + 1) % PARTS;
    const bool end = left == END;
    left--;
#pragma unroll
    for (int pair = lane; pair < BN / 2; pair += 32) {  // two columns each: group pair / 4 of eight, quarter pair % 4
      const float2 scales = load_two(at.scales_b + ring.stage * SB_BYTES + pair * 8);
      u32 packed;
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(scales.y * 448.0f), "f"(scales.x * 448.0f));
      const u32 to = at.packed + (ring.stage * 4 + pair % 4) * QUARTER_BYTES + pair / 4 * 4;
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(packed) : "memory");
    }
    __syncwarp();
    if (lane == 0) barrier_arrive_here(at.ready + 8 * ring.stage);
    if (end) return;
  }
}

// Where a thread's two values of column group j of a box go; those of the row eight further down lie 1024 bytes on.
static __device__ __forceinline__ u32 place_in_box(int lane, int j) {
  return lane / 4 * 128 + lane % 2 * 8 + (((j % 4 * 2 + lane % 4 / 2) ^ lane / 4) << 4);
}
static __device__ __forceinline__ void put_two(u32 to, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(x), "f"(y) : "memory");
}

// One warp's 16 rows at (column, row) of an expert: into shared memory, and from there through the copy engine, which adds
// them in L2 and leaves out what lies outside. One block owns each element of a launch, and a tile's second part waits until
// the first is written, so the order of the sum is fixed.
static __device__ __forceinline__ void send(const float (&sum)[BN / 2], u32 buffer, const TensorMap& map_d, const Part& part,
                                            int row, int lane) {
#pragma unroll
  for (int box = 0; box < BN / 32; box++) {
    if (lane == 0) boxes_read();
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float* f = sum + (box * 4 + j) * 4;
      const u32 to = buffer + place_in_box(lane, j);
      put_two(to, f[0], f[1]), put_two(to + 8 * 128, f[2], f[3]);
    }
    fence_for_copies();
    __syncwarp();
    if (lane == 0) {
      const int x = part.column + box * 32;
      if (ACCUMULATE || part.adds) add_box(map_d, buffer, x, row, part.expert);
      else store_box(map_d, buffer, x, row, part.expert);
      boxes_commit();
    }
  }
}

// RELOAD: one warp's 16 rows onto what lies in the tile's place, which `room` says is there.
static __device__ __forceinline__ void put(const float (&sum)[BN / 2], const Shared& at, int warp, int lane, u32 parity) {
  barrier_wait(at.room, parity);
#pragma unroll
  for (int j = 0; j < BN / 8; j++) {
    const float* f = sum + j * 4;
    const u32 to = at.out + j / 4 * BOX_BYTES + warp * (16 * 128) + place_in_box(lane, j);
    const float2 none = make_float2(0, 0), upper = ACCUMULATE ? load_two(to) : none, lower = ACCUMULATE ? load_two(to + 8 * 128) : none;
    put_two(to, f[0] + upper.x, f[1] + upper.y), put_two(to + 8 * 128, f[2] + lower.x, f[3] + lower.y);
  }
  fence_for_copies();
  __syncwarp();
  if (lane == 0) barrier_arrive_here(at.written);
}

// RELOAD: the thread that reads the gradient's tiles and writes them back.
static __device__ __forceinline__ void exchange(const Shared& at, const TensorMap& map_d, Walk walk, u32 rank) {
  u32 parity = 0;
  for (int unit = blockIdx.x / 2; walk.seek(unit); unit += gridDim.x / 2) {
    if (ACCUMULATE && walk.num_k == 0) continue;
    const int row = walk.row + (ALONG_M ? rank * BM : 0), column = (WIDE * walk.column + (ALONG_M ? 0 : rank)) * BN;
    barrier_expect(at.room, ACCUMULATE ? OUT_BYTES : 0);
    for (int box = 0; ACCUMULATE && box < BN / 32; box++) {
      read_box(at.out + box * BOX_BYTES, map_d, at.room, column + box * 32, row, walk.expert);
    }
    barrier_wait(at.written, parity), parity ^= 1;
    for (int box = 0; box < BN / 32; box++) store_box(map_d, at.out + box * BOX_BYTES, column + box * 32, row, walk.expert);
    boxes_commit();
    boxes_read();
  }
}

// The next stage is awaited and the rows' scales are read while the matrix unit works; addresses are carried along, and
// WARPGROUP is a template argument, so that they lie in the uniform registers.
template <int WARPGROUP>
static __device__ __forceinline__ void consume(const Shared& at, const TensorMap& map_d) {
  const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
  const u32 my_scales = at.scales_a + (warp * 16 + lane / 4) * 4, my_packed = at.packed + lane % 4 * QUARTER_BYTES;
  u32 room_parity = 0;
  Stage<STAGES, A_BYTES, B_BYTES> stage(at.a + WARPGROUP * (64 * BK), at.b, at.ready);
  float sum[SUBTILES][BN / 2], acc[BN / 2];
  auto await = [&]() { barrier_wait(stage.full, stage.parity); };
  auto leave = [&]() {  // the stage, for the next
    const u32 used = stage.full;
    stage.next();
    if (AHEAD) await();
    return used;
  };
  auto release = [&](u32 used) {
    if (lane < 2) barrier_arrive(used + 8 * STAGES, lane);
  };
  if (AHEAD) await();
  if (TURNS && WARPGROUP == 1) asm volatile("bar.arrive 1, 256;" ::: "memory");
  for (int slot = 0;; slot = (slot + 1) % PARTS) {
    if (!AHEAD) await();
    int left = part_of(at, slot).count;
    if (left == END) break;
#pragma unroll
    for (int i = 0; i < SUBTILES * BN / 2; i++) sum[i / (BN / 2)][i % (BN / 2)] = 0;
    if (left == NOTHING) release(leave());
#pragma unroll 1
    for (; left > 0; left--) {
      if (!AHEAD) await();
      u32 scales[BN / 8];
#pragma unroll
      for (int subtile = 0; subtile < SUBTILES; subtile++) {
        if (TURNS) asm volatile("bar.sync %0, 256;" ::"n"(1 + WARPGROUP) : "memory");
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; step++) {
          wgmma(acc, matrix(stage.a + subtile * (128 * BK / 16) + 2 * step), matrix(stage.b + 2 * step), step > 0);
          if (TURNS && step == 2) wgmma_commit();
        }
        wgmma_commit();
        if (subtile == 0) {
#pragma unroll
          for (int j = 0; j < BN / 8; j += 4) {
            const uint4 four = load_four(my_packed + stage.index * (4 * QUARTER_BYTES) + j * 4);
            scales[j] = four.x, scales[j + 1] = four.y, scales[j + 2] = four.z, scales[j + 3] = four.w;
          }
        }
        const u32 from_row = my_scales + stage.index * SA_BYTES + subtile * 512;
        const float upper = load_one(from_row) * (1.0f / 448.0f), lower = load_one(from_row + 32) * (1.0f / 448.0f);
        if (TURNS) {  // the other's products follow this one's last
          wgmma_wait<1>();
          asm volatile("bar.arrive %0, 256;" ::"n"(2 - WARPGROUP) : "memory");
        }
        const u32 used = subtile == SUBTILES - 1 ? leave() : 0;
        wgmma_wait<0>();
        if (subtile == SUBTILES - 1) release(used);
#pragma unroll
        for (int j = 0; j < BN / 8; j++) {
          const float left_scale = __uint_as_float(scales[j] << 16), right_scale = __uint_as_float(scales[j] & 0xffff0000u);
          float* to = sum[subtile] + 4 * j;
          to[0] += acc[4 * j] * (upper * left_scale), to[1] += acc[4 * j + 1] * (upper * right_scale);
          to[2] += acc[4 * j + 2] * (lower * left_scale), to[3] += acc[4 * j + 3] * (lower * right_scale);
        }
      }
    }
    if constexpr (RELOAD) {
      put(sum[0], at, warp, lane, room_parity), room_parity ^= 1;
    } else {
      const Part part = part_of(at, slot);
      if (lane == 0) boxes_written();
#pragma unroll
      for (int subtile = 0; subtile < SUBTILES; subtile++) {
        send(sum[subtile], at.out + warp * BOX_BYTES, map_d, part, part.row + subtile * 128 + warp * 16, lane);
      }
    }
  }
  if (lane == 0) boxes_read();
}

// a [M, P], scale_a [P/128, M], b [N, P], scale_b [P/128, N], d [experts, M, N]; counts is null for one expert with
// num_rows columns.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
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
  at.packed = at.scales_b + STAGES * SB_BYTES;
  at.parts = at.packed + STAGES * 4 * QUARTER_BYTES;
  at.full = at.parts + PARTS * 16;
  at.ready = at.full + 8 * STAGES;
  at.empty = at.ready + 8 * STAGES;
  at.room = at.empty + 8 * STAGES;
  at.written = at.room + 8;
  const u32 rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(at.full + 8 * s, 1), barrier_init(at.ready + 8 * s, 1);
      barrier_init(at.empty + 8 * s, 2 * CONSUMER_WARPS);
    }
    barrier_init(at.room, 1), barrier_init(at.written, CONSUMER_WARPS);
    barrier_init_done();
    prefetch_map(map_a), prefetch_map(map_sa), prefetch_map(map_b), prefetch_map(map_sb), prefetch_map(map_d);
  }
  cluster_sync();
  begin();
  const int num_tiles = (M + HIGH * BM - 1) / (HIGH * BM), num_columns = (N + WIDE * BN - 1) / (WIDE * BN);
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    const Walk walk(counts, num_rows, num_experts, num_tiles, num_columns);
    if (threadIdx.x == 0) produce(at, map_a, map_sa, map_b, map_sb, walk, rank);
    if (RELOAD && threadIdx.x == 32) exchange(at, map_d, walk, rank);
    if (threadIdx.x / 32 == 2) pack(at);
  } else if (threadIdx.x < 256) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume<0>(at, map_d);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume<1>(at, map_d);
  }
  __syncwarp();
  cluster_sync();  // the other block may still write here
}
