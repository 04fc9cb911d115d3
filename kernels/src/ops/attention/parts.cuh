// What backward.cu is made of. Follows hopper.cuh and the matrix instructions that the host writes for it.
//
// Defined from outside: DK, DV.
constexpr int KEYS = 128, QUERIES = 64, STAGES = 2;
constexpr int K_PANEL = KEYS * 64, V_PANEL = KEYS * 128, PANEL = QUERIES * 128;  // bytes: 32, 64, 64 columns
constexpr int K_BYTES = DK / 32 * K_PANEL, V_BYTES = DV / 64 * V_PANEL;
constexpr int Q_BYTES = DK / 64 * PANEL, DO_BYTES = DV / 64 * PANEL, STATS_BYTES = 2 * QUERIES * 4;
constexpr int STAGE_BYTES = Q_BYTES + DO_BYTES + STATS_BYTES, DS_BYTES = KEYS * 128;
constexpr int HALF = DK / 2, TILES = HALF / 8;              // of dQ's columns, a warpgroup's, and of eight
constexpr int SUMS = QUERIES * DK, DQ_BYTES = SUMS / 2 * 4;  // of one head's 64 queries; a warpgroup's half
constexpr int WARPS = 8, SENDER = 32;  // SENDER: the warpgroup's thread that sends dQ, in another warp than the one that loads
constexpr float LOG2E = 1.4426950408889634f;

struct Shared {
  u32 k, v, q, dout, ds, dq, stats, keys, full, empty;
};

static __device__ __forceinline__ Shared shared(u32 begin) {
  Shared at;
  at.k = (begin + 1023) & ~1023u;  // the swizzle repeats every 1024 bytes
  at.v = at.k + K_BYTES;
  at.q = at.v + V_BYTES;
  at.dout = at.q + STAGES * Q_BYTES;
  at.ds = at.dout + STAGES * DO_BYTES;
  at.dq = at.ds + DS_BYTES;
  at.stats = at.dq + 2 * DQ_BYTES;
  at.keys = at.stats + STAGES * STATS_BYTES;
  at.full = at.keys + 8;
  at.empty = at.full + 8 * STAGES;
  return at;
}

// What a block works on.
struct Place {
  int one, head, batch;  // of all heads of all sequences; within its sequence
  int key, first;        // its first key, and the first 64 queries that see one
  int stats;             // of its head, in blocks of 64 queries
};

// One head after another, of each the last keys first: those before wait for them. Volatile: it is made again after the loop, which
// has no register to keep it in.
static __device__ __forceinline__ Place place(int S, int H) {
  int block;
  asm volatile("mov.u32 %0, %%ctaid.x;\nmov.u32 %1, %1;\nmov.u32 %2, %2;" : "=r"(block), "+r"(S), "+r"(H));
  const int key_blocks = (S + KEYS - 1) / KEYS, one = block / key_blocks, keys = key_blocks - 1 - block % key_blocks;
  return {one, one % H, one / H, keys * KEYS, keys * (KEYS / QUERIES), one * ((S + QUERIES - 1) / QUERIES)};
}

// Of the warpgroup. Volatile for the same reason.
static __device__ __forceinline__ int thread() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index % 128;
}

template <int ID, int THREADS>
static __device__ __forceinline__ void meet() {
  asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}
// As `meet`, without waiting for the others.
template <int ID, int THREADS>
static __device__ __forceinline__ void pass() {
  asm volatile("bar.arrive %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}

static __device__ __forceinline__ void load_box4(u32 to, const TensorMap& map, u32 barrier, int x, int s, int h, int b) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(s), "r"(h), "r"(b)
      : "memory");
}

static __device__ __forceinline__ void load_bytes(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier)
               : "memory");
}

static __device__ __forceinline__ void load_keys(const Shared& at, const TensorMap& map_k, const TensorMap& map_v, Place place) {
  barrier_expect(at.keys, K_BYTES + V_BYTES);
#pragma unroll
  for (int i = 0; i < DK / 32; i++) load_box4(at.k + i * K_PANEL, map_k, at.keys, i * 32, place.key, place.head, place.batch);
#pragma unroll
  for (int i = 0; i < DV / 64; i++) load_box4(at.v + i * V_PANEL, map_v, at.keys, i * 64, place.key, place.head, place.batch);
}

static __device__ __forceinline__ void load_queries(const Shared& at, u32 stage, const TensorMap& map_q, const TensorMap& map_dout,
                                                    const float* stats, int block, Place place) {
  const u32 full = at.full + 8 * stage, q = at.q + stage * Q_BYTES, dout = at.dout + stage * DO_BYTES;
  barrier_expect(full, STAGE_BYTES);
#pragma unroll
  for (int i = 0; i < DK / 64; i++) load_box4(q + i * PANEL, map_q, full, i * 64, block * QUERIES, place.head, place.batch);
  load_bytes(at.stats + stage * STATS_BYTES, stats + (place.stats + block) * (2 * QUERIES), STATS_BYTES, full);
#pragma unroll
  for (int i = 0; i < DV / 64; i++) load_box4(dout + i * PANEL, map_dout, full, i * 64, block * QUERIES, place.head, place.batch);
}

// Low halves of descriptors: the place, and 8192 bytes from one panel to the next, which only those read along the other way ask
// for. Then the high halves: 1024 bytes between groups of eight rows of 128, swizzled over 128; 512 of 64, over 64.
static __device__ __forceinline__ u32 low(u32 address) { return (address & 0x3FFFF) >> 4 | (8192 >> 4) << 16; }
static __device__ __forceinline__ u64 wide(u32 low) { return (u64)low | (u64)(1024 >> 4) << 32 | (u64)1 << 62; }
static __device__ __forceinline__ u64 narrow(u32 low) { return (u64)low | (u64)(512 >> 4) << 32 | (u64)2 << 62; }

static __device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

static __device__ __forceinline__ float2 pair_at(u32 from) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(from));
  return pair;
}

// The sums of 64 queries' dQ are added to by one block after the other, and written by the first, that of the last keys that they
// see: the same bits every time. `turns` counts those that are done. A block waits for blocks of smaller numbers only, which run
// or have run: Hopper starts blocks in their order, though CUDA does not promise it. Adding, and the count, happen in L2 in the
// order in which this thread sees them: again the hardware's order. PTX asks for a release and a proxy fence, which cost a
// seventh of the speed.
static __device__ __forceinline__ void add_in_turn(float* sums, u32 from, const int* turns, int turn) {
  if (turn == 0) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(sums), "r"(from), "n"(DQ_BYTES) : "memory");
  } else {
    int done;
    do {
      asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(done) : "l"(turns) : "memory");
    } while (done != turn);
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(sums), "r"(from), "n"(DQ_BYTES)
                 : "memory");
  }
  boxes_commit();
}

// Once what this thread has sent has arrived.
static __device__ __forceinline__ void end_turn(int* turns) {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  asm volatile("red.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(turns) : "memory");
}

// 64 rows of a gradient from the registers: a lane holds pairs of neighbours of rows lane / 4 and lane / 4 + 8.
template <int WIDTH>
static __device__ __forceinline__ void write(const float (&sum)[WIDTH / 2], u16* to, long long stride, int rows, float scale, int lane) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = lane / 4 + 8 * half;
    if (row < rows) {
      u32* place = (u32*)(to + row * stride) + lane % 4;
#pragma unroll
      for (int j = 0; j < WIDTH / 8; j++) place[4 * j] = bf16_pair(sum[4 * j + 2 * half] * scale, sum[4 * j + 2 * half + 1] * scale);
    }
  }
}
