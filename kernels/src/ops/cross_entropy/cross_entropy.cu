// Softmax cross-entropy of BF16 logits: a row is read once into the shared memory of a cluster of four blocks, and left
// as its gradient softmax − onehot.
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int THREADS = 512, PARTS = 4;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

static __device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

static __device__ __forceinline__ u32 bf16_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

static __device__ __forceinline__ u32 larger_pair(u32 a, u32 b) {
  u32 larger;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

static __device__ __forceinline__ float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
static __device__ __forceinline__ float high_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Σ e^x as 2^most · sum.
struct Sum {
  float most, sum;
};

static __device__ __forceinline__ Sum join(Sum a, Sum b) {
  const float most = fmaxf(a.most, b.most);
  return {most, a.sum * exp2_fast(a.most - most) + b.sum * exp2_fast(b.most - most)};
}

// e^x of eight logits, divided by 2^by.
static __device__ __forceinline__ void powers(float (&v)[8], uint4 raw, float by) {
  const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = exp2_fast(fmaf(i % 2 ? high_bf16(words[i / 2]) : low_bf16(words[i / 2]), LOG2E, -by));
}

static __device__ __forceinline__ void read_part(u32 to, const u16* from, int bytes, u32 barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

static __device__ __forceinline__ void await(u32 barrier) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra AGAIN;\n}" ::"r"(barrier)
      : "memory");
}

// The sum over the cluster, in one order whoever asks.
static __device__ __forceinline__ Sum over_cluster(Sum mine, u32 rank) {
  __shared__ Sum of_warp[THREADS / 32], of_part[PARTS];
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    mine = join(mine, {__shfl_xor_sync(~0u, mine.most, step), __shfl_xor_sync(~0u, mine.sum, step)});
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");  // the others are there to be written to
  if (threadIdx.x < PARTS) {
    Sum all = of_warp[0];
    for (int w = 1; w < THREADS / 32; w++) all = join(all, of_warp[w]);
    const u32 at = (u32)__cvta_generic_to_shared(of_part + rank);
    asm volatile(
        "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
        "st.shared::cluster.v2.f32 [remote], {%2, %3};\n}" ::"r"(at), "r"(threadIdx.x), "f"(all.most), "f"(all.sum)
        : "memory");
  }
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  Sum all = of_part[0];
#pragma unroll
  for (int p = 1; p < PARTS; p++) all = join(all, of_part[p]);
  return all;
}

// logits [T, V] → dlogits [T, V], which may be the same memory, and losses [T]. A target outside the vocabulary gives a
// loss that is no number. V is a multiple of 8; `part` elements a block, in dynamic shared memory.
extern "C" __global__ void __cluster_dims__(PARTS, 1, 1) __launch_bounds__(THREADS)
    cross_entropy(const u16* logits, const long long* targets, u16* dlogits, float* losses, int V, int part) {
  extern __shared__ __align__(128) u8 shared[];
  __shared__ __align__(8) u64 barrier;
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  const u32 rank = blockIdx.x % PARTS, barrier_at = (u32)__cvta_generic_to_shared(&barrier);
  const long long row = blockIdx.x / PARTS;
  const int start = rank * part, count = max(0, min(part, V - start)), num_pieces = count / 8;
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.proxy.async.shared::cta;" ::"r"(barrier_at) : "memory");
    if (count) read_part((u32)__cvta_generic_to_shared(shared), logits + row * V + start, count * 2, barrier_at);
  }
  const long long target = __ldg(targets + row);
  const int target_here = target >= start && target < start + count ? (int)(target - start) : -1;
  __syncthreads();
  if (count) await(barrier_at);
  Sum mine = {-3e38f, 0};
  for (int i = threadIdx.x; i < num_pieces; i += THREADS) {
    const uint4 raw = *((const uint4*)shared + i);
    const u32 two = larger_pair(larger_pair(raw.x, raw.y), larger_pair(raw.z, raw.w));
    const float most = fmaxf(mine.most, fmaxf(low_bf16(two), high_bf16(two)) * LOG2E);
    mine.sum *= exp2_fast(mine.most - most), mine.most = most;
    float v[8];
    powers(v, raw, most);
    mine.sum += ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
  }
  const Sum all = over_cluster(mine, rank);
  const float log_sum = all.most + __log2f(all.sum);
  for (int i = threadIdx.x; i < num_pieces; i += THREADS) {
    float v[8];
    powers(v, *((const uint4*)shared + i), log_sum);
    if (i == target_here >> 3) {
      losses[row] = log_sum * LN2 - low_bf16(((const u16*)shared)[target_here]);
#pragma unroll
      for (int c = 0; c < 8; c++) v[c] -= c == target_here % 8 ? 1.0f : 0.0f;
    }
    const uint4 out = make_uint4(bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3]), bf16_pair(v[4], v[5]), bf16_pair(v[6], v[7]));
    *((uint4*)(dlogits + row * V + start) + i) = out;
  }
  if (rank == 0 && threadIdx.x == 0 && (target < 0 || target >= V)) losses[row] = __int_as_float(0x7fffffff);
}
