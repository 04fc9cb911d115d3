// out[i] = number first + i of a key, times std; of = {key, first, bits of std}.
constexpr int THREADS = 256;

__device__ unsigned long long mix(unsigned long long x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

__device__ double unit(unsigned long long word) { return ((double)(word >> 11) + 0.5) / 9007199254740992.0; }

extern "C" __global__ void __launch_bounds__(THREADS) normal(float* out, const unsigned long long* of, int count) {
  const unsigned long long key = of[0], first = of[1];
  const double std = __longlong_as_double(of[2]);
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < count; i += gridDim.x * THREADS) {
    const unsigned long long index = first + i;
    const double radius = sqrt(-2.0 * log(unit(mix(key ^ mix(2 * index)))));
    out[i] = (float)(radius * cospi(2.0 * unit(mix(key ^ mix(2 * index + 1)))) * std);
  }
}
