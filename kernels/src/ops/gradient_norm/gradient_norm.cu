// Σ x², a part for each block, always in the same order.
constexpr int THREADS = 256;

// With ADD x becomes x + more first.
template <bool ADD>
__device__ void pass(float* x, const float* more, double* parts, int count) {
  const int num_pieces = count / 4, stride = gridDim.x * THREADS;
  float sums[4] = {0, 0, 0, 0};
#pragma unroll 8
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < num_pieces; i += stride) {
    float4 v = __ldcs((const float4*)x + i);
    if (ADD) {
      const float4 w = __ldcs((const float4*)more + i);
      v.x += w.x, v.y += w.y, v.z += w.z, v.w += w.w;
      __stcs((float4*)x + i, v);
    }
    sums[0] += v.x * v.x, sums[1] += v.y * v.y, sums[2] += v.z * v.z, sums[3] += v.w * v.w;
  }
  double sum = (double)sums[0] + sums[1] + sums[2] + sums[3];
  if (blockIdx.x == 0 && threadIdx.x < count % 4) {
    const int i = num_pieces * 4 + threadIdx.x;
    const float v = ADD ? x[i] + more[i] : x[i];
    if (ADD) x[i] = v;
    sum += (double)v * v;
  }
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

extern "C" __global__ void __launch_bounds__(THREADS) sum_of_squares(float* x, double* parts, int count) {
  pass<false>(x, nullptr, parts, count);
}

extern "C" __global__ void __launch_bounds__(THREADS) add_and_square(float* x, const float* more, double* parts, int count) {
  pass<true>(x, more, parts, count);
}
