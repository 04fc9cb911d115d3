// out[t] = add[t] + more[t] + Σ over k of rows[index[t, k]], summed in FP32 in the order of k. One block a token.
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;

constexpr int THREADS = 128;

static __device__ __forceinline__ void add_eight(float (&sum)[8], uint4 raw) {
  const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 8; i++) {
    sum[i] += __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
  }
}

static __device__ __forceinline__ u32 bf16_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// rows [R, D], index [T, K] with -1 for none, add and more [T, D] or null → out [T, D]. D a multiple of 8.
extern "C" __global__ void __launch_bounds__(THREADS)
    unpermute(const u16* rows, const int* index, const u16* add, const u16* more, u16* out, int K, int D) {
  const long long token = blockIdx.x;
  for (int at = threadIdx.x * 8; at < D; at += THREADS * 8) {
    float sum[8] = {};
    if (add) add_eight(sum, __ldcs((const uint4*)(add + token * D + at)));
    if (more) add_eight(sum, __ldcs((const uint4*)(more + token * D + at)));
#pragma unroll 8
    for (int k = 0; k < K; k++) {
      const int row = __ldg(index + token * K + k);
      if (row >= 0) add_eight(sum, __ldcs((const uint4*)(rows + (long long)row * D + at)));
    }
    *(uint4*)(out + token * D + at) =
        make_uint4(bf16_pair(sum[0], sum[1]), bf16_pair(sum[2], sum[3]), bf16_pair(sum[4], sum[5]), bf16_pair(sum[6], sum[7]));
  }
}
