// The router behind its logits: a warp a token, expert e in lane e mod 32. Sums have one order; counts are integers.
using u64 = unsigned long long;
using u32 = unsigned int;
constexpr int WARPS = 8, EACH = (EXPERTS + 31) / 32, TOKENS = 32;  // tokens of a block, all of one sequence
constexpr int GROUP = EXPERTS / GROUPS;

// Larger values are larger keys, and of equal values the first; 0 is below all. NaN is above all, as in torch (but a group of
// experts is scored by its others; whoever sees such a token's weights sees NaN all the same).
static __device__ __forceinline__ u64 key(float value, int index) {
  const u32 bits = __float_as_uint(value);
  const u32 order = value != value ? ~0u : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (u64)order << 32 | (u32)~index;
}
static __device__ __forceinline__ int index_of(u64 key) { return (int)~(u32)key; }
static __device__ __forceinline__ u64 largest(u64 mine) {
#pragma unroll
  for (int step = 16; step; step /= 2) {
    const u64 other = __shfl_xor_sync(~0u, mine, step);
    mine = other > mine ? other : mine;
  }
  return mine;
}
static __device__ __forceinline__ float sum(float mine) {
#pragma unroll
  for (int step = 16; step; step /= 2) mine += __shfl_xor_sync(~0u, mine, step);
  return mine;
}

// The TOP_K largest, in their order: lane k gets the k-th.
static __device__ __forceinline__ int choose(u64 (&keys)[EACH], int lane) {
  int chosen = 0;
#pragma unroll
  for (int k = 0; k < TOP_K; k++) {
    u64 mine = 0;
#pragma unroll
    for (int j = 0; j < EACH; j++) mine = keys[j] > mine ? keys[j] : mine;
    const u64 best = largest(mine);
#pragma unroll
    for (int j = 0; j < EACH; j++) keys[j] = keys[j] == best ? 0 : keys[j];
    if (lane == k) chosen = index_of(best);
  }
  return chosen;
}

// logits [B·S, E], bias [E] → scores [B·S, E]; routes and weights [B·S, K] by biased score; counts [E] of the routes; top [B, E],
// counts of the K largest scores without bias; parts [B, blocks, E], Σ score / Σ of the token's scores. Blocks × B.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    forward(const float* logits, const float* bias, float* scores, long long* routes, float* weights, u64* counts, int* top, float* parts, int S, float factor) {
  __shared__ float biased[WARPS][EXPERTS], plain[WARPS][EXPERTS];
  __shared__ int of_route[EXPERTS], of_top[EXPERTS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int e = threadIdx.x; e < EXPERTS; e += WARPS * 32) of_route[e] = of_top[e] = 0;
  __syncthreads();
  float shares[EACH] = {};
  const int end = min(S, (int)(blockIdx.x + 1) * TOKENS);
  for (int t = blockIdx.x * TOKENS + warp; t < end; t += WARPS) {
    const long long token = (long long)blockIdx.y * S + t;
    float score[EACH], total = 0;
    u64 keys[EACH], by_score[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      const int e = j * 32 + lane;
      const bool there = e < EXPERTS;
      score[j] = there ? 1.0f / (1.0f + expf(-logits[token * EXPERTS + e])) : 0.0f;
      const float with_bias = there ? score[j] + bias[e] : 0.0f;
      keys[j] = there ? key(with_bias, e) : 0;
      by_score[j] = there ? key(score[j], e) : 0;
      total += score[j];
      if (there) scores[token * EXPERTS + e] = plain[warp][e] = score[j], biased[warp][e] = with_bias;
    }
    total = sum(total);
#pragma unroll
    for (int j = 0; j < EACH; j++) shares[j] += score[j] / total;
    __syncwarp();
    if (TOP_GROUPS < GROUPS) {
      // A group counts by its two best.
      u64 group = 0;
      if (lane < GROUPS) {
        float first = __int_as_float(0xff800000), second = first;  // −∞
        for (int e = lane * GROUP; e < (lane + 1) * GROUP; e++) {
          const float value = biased[warp][e];
          second = fmaxf(second, fminf(first, value)), first = fmaxf(first, value);
        }
        group = key(first + second, lane);
      }
      u32 open = 0;
      for (int m = 0; m < TOP_GROUPS; m++) {
        const u64 best = largest(group);
        group = group == best ? 0 : group;
        open |= 1u << index_of(best);
      }
#pragma unroll
      for (int j = 0; j < EACH; j++) keys[j] = open >> min(31, (j * 32 + lane) / GROUP) & 1 ? keys[j] : 0;
    }
    const int expert = choose(keys, lane), best = choose(by_score, lane);
    const float chosen = lane < TOP_K ? plain[warp][expert] : 0.0f, all = sum(chosen);
    if (lane < TOP_K) {
      routes[token * TOP_K + lane] = expert;
      weights[token * TOP_K + lane] = (RENORMALISE ? chosen / (all + 1e-20f) : chosen) * factor;
      atomicAdd(of_route + expert, 1), atomicAdd(of_top + best, 1);
    }
    __syncwarp();  // the next token's scores
  }
  __syncthreads();
  for (int e = threadIdx.x; e < EXPERTS; e += WARPS * 32) {
    if (of_route[e]) atomicAdd(counts + e, (u64)of_route[e]);
    if (of_top[e]) atomicAdd(top + blockIdx.y * EXPERTS + e, of_top[e]);
  }
  // The warps' shares, in their order.
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    if (j * 32 + lane < EXPERTS) plain[warp][j * 32 + lane] = shares[j];
  }
  __syncthreads();
  for (int e = threadIdx.x; e < EXPERTS; e += WARPS * 32) {
    float all = 0;
    for (int w = 0; w < WARPS; w++) all += plain[w][e];
    parts[((long long)blockIdx.y * gridDim.x + blockIdx.x) * EXPERTS + e] = all;
  }
}

// scores [B·S, E], routes and dweights [B·S, K], balance [B, E], the gradient of each score's share → dlogits [B·S, E].
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    backward(const float* scores, const long long* routes, const float* dweights, const float* balance, float* dlogits, int S, int T, float factor) {
  const int lane = threadIdx.x % 32;
  const long long token = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
  if (token >= T) return;
  const float* of_sequence = balance + token / S * EXPERTS;
  float score[EACH], c[EACH], total = 0, product = 0;
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    const int e = j * 32 + lane;
    score[j] = e < EXPERTS ? scores[token * EXPERTS + e] : 0.0f;
    c[j] = e < EXPERTS ? of_sequence[e] : 0.0f;
    total += score[j], product += c[j] * score[j];
  }
  total = sum(total), product = sum(product);
  const int expert = lane < TOP_K ? (int)routes[token * TOP_K + lane] : -1;
  float dchosen = lane < TOP_K ? dweights[token * TOP_K + lane] * factor : 0.0f;
  if (RENORMALISE) {
    // w = g / Σg: dg = (dw − Σ dw·w) / Σg
    const float chosen = lane < TOP_K ? scores[token * EXPERTS + expert] : 0.0f;
    const float all = sum(chosen) + 1e-20f, projection = sum(dchosen * chosen) / all;
    dchosen = (dchosen - projection) / all;
  }
  // The share is s / Σs: ds = (c − Σ c·s/Σs) / Σs.
  float d[EACH];
#pragma unroll
  for (int j = 0; j < EACH; j++) d[j] = (c[j] - product / total) / total;
#pragma unroll
  for (int k = 0; k < TOP_K; k++) {
    const int at = __shfl_sync(~0u, expert, k);
    const float more = __shfl_sync(~0u, dchosen, k);
#pragma unroll
    for (int j = 0; j < EACH; j++) d[j] += j * 32 + lane == at ? more : 0.0f;
  }
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    const int e = j * 32 + lane;
    if (e < EXPERTS) dlogits[token * EXPERTS + e] = d[j] * (score[j] * (1.0f - score[j]));
  }
}
