// Hopper's parts that the FP8 GEMMs and attention's backward are made of: barriers in shared memory, the bulk copy engine, clusters of two.
// No header is included, so that NVRTC needs no CUDA installation.

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// Lets the next kernel of the stream take places as this one's blocks end, and waits until the one before is done:
// nothing is read or written before this.
static __device__ __forceinline__ void begin() {
  asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
}

static __device__ __forceinline__ u32 bf16_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
static __device__ __forceinline__ float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
static __device__ __forceinline__ float high_bf16(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }

// A tensor map is an opaque 128-byte kernel parameter.
struct __align__(64) TensorMap { u8 bytes[128]; };

static __device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

static __device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of both blocks; what was written before is seen after.
static __device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

static __device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes initialised barriers visible to the copy engine and to the other block of the cluster.
static __device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

// Arrives, and so many more bytes are to come.
static __device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// So many more bytes are to come; who says so arrives later.
static __device__ __forceinline__ void barrier_expect_bytes(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives on the same barrier of block `rank` of the cluster.
static __device__ __forceinline__ void barrier_arrive(u32 barrier, u32 rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier), "r"(rank)
      : "memory");
}

static __device__ __forceinline__ void barrier_arrive_here(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Without a cluster-wide acquire, which would empty the L1 cache each time: what the barriers guard is written by the
// copy engine and read by the matrix unit, or from shared memory, and neither goes through L1.
static __device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra AGAIN;\n}" ::"r"(barrier), "r"(parity)
      : "memory");
}

// A box at (x, y) of the matrix into shared memory; completes `barrier`.
static __device__ __forceinline__ void load_box(u32 to, const TensorMap& map, u32 barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}

// The same box into the same place of both blocks of the cluster, completing the barrier of each.
static __device__ __forceinline__ void load_box_for_both(u32 to, const TensorMap& map, u32 barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "h"((u16)3)
      : "memory");
}

// Rows of a matrix, for one block or for both, each GROUP of them, 16 or 32, in another order (map_interleaved).
template <bool BOTH, int GROUP>
static __device__ __forceinline__ void load_rows(u32 to, const TensorMap& map, u32 barrier, int x, int row) {
  if constexpr (GROUP == 8) {
    BOTH ? load_box_for_both(to, map, barrier, x, row) : load_box(to, map, barrier, x, row);
  } else if constexpr (BOTH) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%3, %5, %5, %5, %4}], [%2], %6;" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(x), "r"(row / GROUP), "r"(0), "h"((u16)3)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %5, %5, %5, %4}], [%2];" ::"r"(
            to),
        "l"(&map), "r"(barrier), "r"(x), "r"(row / GROUP), "r"(0)
        : "memory");
  }
}

// A box at (x, y, z) of a stack of matrices.
static __device__ __forceinline__ void read_box(u32 to, const TensorMap& map, u32 barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// A box from shared memory to (x, y, z) of a stack of matrices behind the thread's back; what lies outside is left out.
static __device__ __forceinline__ void store_box(const TensorMap& map, u32 from, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
               "r"(from), "r"(x), "r"(y), "r"(z)
               : "memory");
}
static __device__ __forceinline__ void boxes_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until the boxes that this thread sent have been read: their place may be written anew, or given up.
static __device__ __forceinline__ void boxes_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// Makes this thread's writes to shared memory visible to the copy engine.
static __device__ __forceinline__ void fence_for_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Volatile, so that it stays on its side of a change of the register budget: a load in flight there is fatal.
static __device__ __forceinline__ int load_count(const int* from) {
  int count;
  asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(count) : "l"(from));
  return count;
}

static __device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The low half of the descriptor of a K-major tile of 128-byte rows, swizzled over 128 bytes: its place in units of 16
// bytes; and the whole, with 1024 bytes from one group of eight rows to the next.
static __device__ __forceinline__ u32 matrix_low(u32 address) { return (address & 0x3FFFF) >> 4 | 1 << 16; }
static __device__ __forceinline__ u64 matrix(u32 low) { return (u64)low | (u64)(1024 >> 4) << 32 | (u64)1 << 62; }

static __device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
static __device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all groups but the last `PENDING`.
template <int PENDING>
static __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// a / b for a below 2^23, in a quarter of a division's time: the next tile is sought while one is computed.
static __device__ __forceinline__ int quotient(int a, int b) {
  const int guess = (int)__fdividef((float)a, (float)b), rest = a - guess * b;
  return guess + (rest >= b) - (rest < 0);
}

// The ring of stages: both sides walk it in step.
template <int LENGTH>
struct Ring {
  u32 stage = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == LENGTH) stage = 0, parity ^= 1;
  }
};

// The consumers' side of it, with the addresses of the stage's matrices and barrier.
template <int LENGTH, int A_BYTES, int B_BYTES>
struct Stage {
  u32 a, b, full, index = 0, parity = 0;
  __device__ __forceinline__ Stage(u32 a, u32 b, u32 full) : a(matrix_low(a)), b(matrix_low(b)), full(full) {}
  __device__ __forceinline__ void next() {
    a += A_BYTES / 16, b += B_BYTES / 16, full += 8;
    if (++index == LENGTH) {
      index = 0, parity ^= 1;
      a -= LENGTH * (A_BYTES / 16), b -= LENGTH * (B_BYTES / 16), full -= 8 * LENGTH;
    }
  }
};
