// From the up-projections of multi-head latent attention to what attention reads, and back: the rotary part is turned by
// its position, pairs (2i, 2i + 1) together. One block a token; a thread moves eight values.
//
// Follows tile.cuh, for its words of BF16 and its threads a block.
//
// Legend: H heads, N no-position width, R rotary width, V value width, all multiples of 8; S positions of a sequence.

// Four pairs turned by the angles whose cosines and sines begin at `cos` and `sin`; `way` is 1, or −1 to turn back.
static __device__ __forceinline__ uint4 turn(uint4 raw, const float* cos, const float* sin, float way) {
  u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float a = low_bf16(words[i]), b = high_bf16(words[i]), c = __ldg(cos + i), s = __ldg(sin + i) * way;
    words[i] = bf16_pair(a * c - b * s, a * s + b * c);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// q [T, H, N + R] in place.
extern "C" __global__ void __launch_bounds__(THREADS)
    rotate(u16* q, const float* cos, const float* sin, float way, int S, int H, int N, int R) {
  const long long token = blockIdx.x;
  const int each = R / 8;
  cos += token % S * (R / 2), sin += token % S * (R / 2);
  for (int i = threadIdx.x; i < H * each; i += THREADS) {
    const int head = i / each, at = i % each * 8;
    uint4* place = (uint4*)(q + (token * H + head) * (N + R) + N + at);
    *place = turn(*place, cos + at / 2, sin + at / 2, way);
  }
}

// kv [T, H, N + V] and the rotary key [T, R] that all heads share → k [T, H, N + R], v [T, H, V].
extern "C" __global__ void __launch_bounds__(THREADS)
    split(const u16* kv, const u16* rotary, const float* cos, const float* sin, u16* k, u16* v, int S, int H, int N, int R, int V) {
  const long long token = blockIdx.x;
  __shared__ uint4 turned[THREADS];  // R ≤ 8 · THREADS
  if (threadIdx.x < R / 8) {
    const int at = threadIdx.x * 8;
    const long long first = token % S * (R / 2) + at / 2;
    turned[threadIdx.x] = turn(__ldg((const uint4*)(rotary + token * R + at)), cos + first, sin + first, 1);
  }
  __syncthreads();
  kv += token * H * (N + V), k += token * H * (N + R), v += token * H * V;
  const int key = (N + R) / 8, value = V / 8;
  for (int i = threadIdx.x; i < H * key; i += THREADS) {
    const int head = i / key, at = i % key * 8;
    *(uint4*)(k + head * (N + R) + at) = at < N ? __ldcs((const uint4*)(kv + head * (N + V) + at)) : turned[(at - N) / 8];
  }
  for (int i = threadIdx.x; i < H * value; i += THREADS) {
    const int head = i / value, at = i % value * 8;
    *(uint4*)(v + head * V + at) = __ldcs((const uint4*)(kv + head * (N + V) + N + at));
  }
}

// The backward of split: dk [T, H, N + R], dv [T, H, V] → dkv [T, H, N + V], d(rotary key) [T, R], summed over the heads in
// FP32 in one order and turned back.
extern "C" __global__ void __launch_bounds__(THREADS)
    join(const u16* dk, const u16* dv, const float* cos, const float* sin, u16* dkv, u16* drotary, int S, int H, int N, int R, int V) {
  const long long token = blockIdx.x;
  extern __shared__ float sums[];  // [lanes, R]
  dk += token * H * (N + R), dv += token * H * V, dkv += token * H * (N + V);
  const int row = (N + V) / 8, each = R / 8, lanes = THREADS / each;
  for (int i = threadIdx.x; i < H * row; i += THREADS) {
    const int head = i / row, at = i % row * 8;
    const u16* from = at < N ? dk + head * (N + R) + at : dv + head * V + at - N;
    *(uint4*)(dkv + head * (N + V) + at) = __ldcs((const uint4*)from);
  }
  const int lane = threadIdx.x / each, at = threadIdx.x % each * 8;
  if (lane < lanes) {
    float sum[8] = {};
    for (int head = lane; head < H; head += lanes) {
      const uint4 raw = __ldg((const uint4*)(dk + head * (N + R) + N + at));
      const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int c = 0; c < 8; c++) sum[c] += c % 2 ? high_bf16(words[c / 2]) : low_bf16(words[c / 2]);
    }
#pragma unroll
    for (int c = 0; c < 8; c++) sums[lane * R + at + c] = sum[c];
  }
  __syncthreads();
  if (threadIdx.x < R / 2) {
    float a = 0, b = 0;
    for (int l = 0; l < lanes; l++) a += sums[l * R + 2 * threadIdx.x], b += sums[l * R + 2 * threadIdx.x + 1];
    // As the sum would be stored.
    const u32 rounded = bf16_pair(a, b);
    a = low_bf16(rounded), b = high_bf16(rounded);
    const long long angle = token % S * (R / 2) + threadIdx.x;
    const float c = __ldg(cos + angle), s = __ldg(sin + angle);
    *(u32*)(drotary + token * R + 2 * threadIdx.x) = bf16_pair(a * c + b * s, b * c - a * s);
  }
}
