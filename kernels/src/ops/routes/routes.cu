// Counts and places of routed rows. A block counts or places in the order of the rows: each thread takes a run of them, and
// learns from the others' counts where it starts.
using u64 = unsigned long long;
constexpr int THREADS = 1024, WARPS = THREADS / 32, MOST_EXPERTS = 8192, MOST_RANKS = 64;
constexpr int K = SLOTS;

// Those of a row, read and written at once.
struct Slots {
  int at[K];
  __device__ Slots(const int* slots, int row) {
    if constexpr (K % 4 == 0) {
#pragma unroll
      for (int k = 0; k < K; k += 4) {
        const int4 four = ((const int4*)slots)[(row * K + k) / 4];
        at[k] = four.x, at[k + 1] = four.y, at[k + 2] = four.z, at[k + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int k = 0; k < K; k++) at[k] = slots[row * K + k];
    }
  }
  __device__ void store(int* slots, int row) const {
    if constexpr (K % 4 == 0) {
#pragma unroll
      for (int k = 0; k < K; k += 4) ((int4*)slots)[(row * K + k) / 4] = make_int4(at[k], at[k + 1], at[k + 2], at[k + 3]);
    } else {
#pragma unroll
      for (int k = 0; k < K; k++) slots[row * K + k] = at[k];
    }
  }
};

// The sum over the threads before this one; `all` becomes everyone's.
static __device__ int sum_before(int mine, int& all) {
  __shared__ int of_warp[WARPS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int upto = mine;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, upto, step);
    if (lane >= step) upto += other;
  }
  __syncthreads();  // whoever reads an earlier call's
  if (lane == 31) of_warp[warp] = upto;
  __syncthreads();
  int before = 0;
  all = 0;
  for (int w = 0; w < WARPS; w++) {
    if (w < warp) before += of_warp[w];
    all += of_warp[w];
  }
  return before + upto - mine;
}

// routes [T, K] → out [experts + ranks + nodes]: rows of each expert, rows to each rank, to each node.
extern "C" __global__ void __launch_bounds__(THREADS) count(const long long* routes, long long* out, int T, int experts, int ranks, int nodes) {
  __shared__ int of_expert[MOST_EXPERTS], of_rank[MOST_RANKS], of_node[MOST_RANKS];
  for (int i = threadIdx.x; i < experts; i += THREADS) of_expert[i] = 0;
  if (threadIdx.x < MOST_RANKS) of_rank[threadIdx.x] = of_node[threadIdx.x] = 0;
  __syncthreads();
  const int share = experts / ranks, node_share = experts / nodes;
  for (int t = threadIdx.x; t < T; t += THREADS) {
    u64 to_rank = 0, to_node = 0;
#pragma unroll
    for (int k = 0; k < K; k++) {
      const int expert = (int)routes[(long long)t * K + k];
      atomicAdd(of_expert + expert, 1);
      to_rank |= 1ull << (expert / share);
      to_node |= 1ull << (expert / node_share);
    }
    for (; to_rank; to_rank &= to_rank - 1) atomicAdd(of_rank + __ffsll(to_rank) - 1, 1);
    for (; to_node; to_node &= to_node - 1) atomicAdd(of_node + __ffsll(to_node) - 1, 1);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < experts; i += THREADS) out[i] = of_expert[i];
  if (threadIdx.x < ranks) out[experts + threadIdx.x] = of_rank[threadIdx.x];
  if (threadIdx.x < nodes) out[experts + ranks + threadIdx.x] = of_node[threadIdx.x];
}

// slots [V, K] → source [S], there [S, K], sent_row [V, P]. A block a rank.
extern "C" __global__ void __launch_bounds__(THREADS) places(const int* slots, int* source, int* there, int* sent_row, int V, int share, int P) {
  const int rank = blockIdx.x, each = (V + THREADS - 1) / THREADS;
  const int first = min(V, (int)threadIdx.x * each), last = min(V, first + each);
  const float part = 1.0f / share;  // a division of small integers that costs four instructions
  const auto ranks_of = [&](const Slots& of_row) {
    u64 ranks = 0;
#pragma unroll
    for (int k = 0; k < K; k++) ranks |= of_row.at[k] >= 0 ? 1ull << (int)((of_row.at[k] + 0.5f) * part) : 0;
    return ranks;
  };
  int mine = 0, lower = 0, lower_all, all;
#pragma unroll 4
  for (int row = first; row < last; row++) {
    const u64 ranks = ranks_of(Slots(slots, row));
    mine += ranks >> rank & 1;
    lower += __popcll(ranks & ((1ull << rank) - 1));
  }
  sum_before(lower, lower_all);
  int at = lower_all + sum_before(mine, all);
#pragma unroll 4
  for (int row = first; row < last; row++) {
    const Slots of_row(slots, row);
    const bool goes = ranks_of(of_row) >> rank & 1;
    sent_row[row * P + rank] = goes ? at : -1;
    if (!goes) continue;
    source[at] = row;
    Slots at_rank = of_row;
#pragma unroll
    for (int k = 0; k < K; k++) {
      const int expert = of_row.at[k] - rank * share;
      at_rank.at[k] = expert >= 0 && expert < share ? expert : -1;
    }
    at_rank.store(there, at++);
  }
}

// slots [V, K], weights [V, K] → row [R], place [V, K], counts [X], sorted [R]. A block an expert.
extern "C" __global__ void __launch_bounds__(THREADS)
    local(const int* slots, const float* weights, int* row_of, int* place, int* counts, float* sorted, int V) {
  const int expert = blockIdx.x, each = (V + THREADS - 1) / THREADS;
  const int first = min(V, (int)threadIdx.x * each), last = min(V, first + each);
  int mine = 0, lower = 0, lower_all, all;
#pragma unroll 4
  for (int row = first; row < last; row++) {
    const Slots of_row(slots, row);
#pragma unroll
    for (int k = 0; k < K; k++) {
      mine += of_row.at[k] == expert;
      lower += of_row.at[k] >= 0 && of_row.at[k] < expert;
    }
  }
  sum_before(lower, lower_all);
  int at = lower_all + sum_before(mine, all);
#pragma unroll 2
  for (int row = first; row < last; row++) {
    const Slots of_row(slots, row);
#pragma unroll
    for (int k = 0; k < K; k++) {
      if (of_row.at[k] != expert) continue;
      row_of[at] = row;
      sorted[at] = weights[row * K + k];
      place[row * K + k] = at++;
    }
  }
  if (threadIdx.x == 0) counts[expert] = all;
  for (int slot = expert * THREADS + threadIdx.x; slot < V * K; slot += gridDim.x * THREADS) {
    if (slots[slot] < 0) place[slot] = -1;
  }
}
