// *sum += Σ (2i + 1) · word i, mod 2⁶⁴, over `count` words of 32 bits, or of 16 bits where NARROW. *sum starts as 0; the
// blocks' parts are added in any order, which does not show.
constexpr int THREADS = 256;
constexpr int PER_WORD = NARROW ? 2 : 1;
constexpr int WORDS = 4 * PER_WORD;  // of 16 bytes

__device__ unsigned long long times_odd(unsigned word, unsigned long long index) { return word * (2 * index + 1); }

extern "C" __global__ void __launch_bounds__(THREADS) checksum(const void* x, unsigned long long* sum, int count) {
  const int pieces = count / WORDS, stride = gridDim.x * THREADS;
  unsigned long long part = 0;
#pragma unroll 4
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < pieces; i += stride) {
    const uint4 v = __ldcs((const uint4*)x + i);
    const unsigned words[4] = {v.x, v.y, v.z, v.w};
    const unsigned long long first = (unsigned long long)i * WORDS;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      if (NARROW) {
        part += times_odd(words[k] & 0xffff, first + 2 * k) + times_odd(words[k] >> 16, first + 2 * k + 1);
      } else {
        part += times_odd(words[k], first + k);
      }
    }
  }
  if (blockIdx.x == 0 && threadIdx.x < count % WORDS) {
    const int i = pieces * WORDS + threadIdx.x;
    part += times_odd(NARROW ? ((const unsigned short*)x)[i] : ((const unsigned*)x)[i], i);
  }
#pragma unroll
  for (int step = 16; step; step /= 2) part += __shfl_xor_sync(~0u, part, step);
  __shared__ unsigned long long of_warp[THREADS / 32];
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = part;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < THREADS / 32; w++) part += of_warp[w];
    atomicAdd(sum, part);
  }
}
