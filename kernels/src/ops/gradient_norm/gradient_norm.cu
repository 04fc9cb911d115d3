// Σ x², a part for each block, always in the same order.
//
// Defined from outside: OTHERS, the ranks that have made a part of a gradient beside this one.
constexpr int THREADS = 256, AT_ONCE = OTHERS < 2 ? 8 : OTHERS < 4 ? 4 : OTHERS < 8 ? 2 : 1;

static __device__ __forceinline__ void write_sum(double sum, double* parts) {
#pragma unroll
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  __shared__ double of_warp[THREADS / 32];
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < THREADS / 32; w++) sum += of_warp[w];
    parts[blockIdx.x] = sum;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) sum_of_squares(const float* x, double* parts, int count) {
  const int num_pieces = count / 4, stride = gridDim.x * THREADS;
  float sums[4] = {0, 0, 0, 0};
#pragma unroll 8
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < num_pieces; i += stride) {
    const float4 v = __ldcs((const float4*)x + i);
    sums[0] += v.x * v.x, sums[1] += v.y * v.y, sums[2] += v.z * v.z, sums[3] += v.w * v.w;
  }
  double sum = (double)sums[0] + sums[1] + sums[2] + sums[3];
  if (blockIdx.x == 0 && threadIdx.x < count % 4) {
    const double v = x[num_pieces * 4 + threadIdx.x];
    sum += v * v;
  }
  write_sum(sum, parts);
}

// Of a gradient's parts, in rank order, this rank's is `own`; the others' are first, then rest [OTHERS - 1, room]. Their sum
// is made in first.
extern "C" __global__ void __launch_bounds__(THREADS)
    add_and_square(float* first, const float* rest, const float* own, double* parts, int rank, int count, int room) {
  auto part = [&](int of) -> const float* {
    const int other = of - (of > rank);
    return of == rank ? own : other == 0 ? first : rest + (long long)(other - 1) * room;
  };
  const int num_pieces = count / 4, stride = gridDim.x * THREADS;
  float sums[4] = {0, 0, 0, 0};
  // Several pieces at a time: no load waits for a store that it might follow.
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < num_pieces; i += AT_ONCE * stride) {
    float4 v[AT_ONCE];
#pragma unroll 8
    for (int of = 0; of <= OTHERS; of++) {
      const float4* from = (const float4*)part(of) + i;
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) {
        const float4 w = i + k * stride < num_pieces ? __ldcs(from + k * stride) : float4{};
        if (of == 0) v[k] = w;
        else v[k].x += w.x, v[k].y += w.y, v[k].z += w.z, v[k].w += w.w;
      }
    }
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
      if (i + k * stride < num_pieces) __stcs((float4*)first + i + k * stride, v[k]);
      sums[0] += v[k].x * v[k].x, sums[1] += v[k].y * v[k].y, sums[2] += v[k].z * v[k].z, sums[3] += v[k].w * v[k].w;
    }
  }
  double sum = (double)sums[0] + sums[1] + sums[2] + sums[3];
  if (blockIdx.x == 0 && threadIdx.x < count % 4) {
    const int i = num_pieces * 4 + threadIdx.x;
    float v = part(0)[i];
    for (int of = 1; of <= OTHERS; of++) v += part(of)[i];
    first[i] = v;
    sum += (double)v * v;
  }
  write_sum(sum, parts);
}
