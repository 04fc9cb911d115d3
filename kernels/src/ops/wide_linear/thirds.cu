// FP32 numbers as three of BF16 whose sum they are: each is what the ones before it leave, rounded.
using u16 = unsigned short;
using u32 = unsigned int;

static __device__ __forceinline__ u32 bf16_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Four values' next part, which is taken off them.
static __device__ __forceinline__ uint2 part_of(float (&rest)[4]) {
  const uint2 part = make_uint2(bf16_pair(rest[0], rest[1]), bf16_pair(rest[2], rest[3]));
  rest[0] -= __uint_as_float(part.x << 16), rest[1] -= __uint_as_float(part.x & 0xffff0000u);
  rest[2] -= __uint_as_float(part.y << 16), rest[3] -= __uint_as_float(part.y & 0xffff0000u);
  return part;
}

// x [R, C], C a multiple of 4 → blocks of the size of x, `row` elements from a row of one to its next, `block` from block to
// block: first parts, first parts, second, third; `reversed`: from the last to the first.
extern "C" __global__ void __launch_bounds__(256) thirds(const float* x, u16* parts, int fours, int C, int row, int block, int reversed) {
  const int at = blockIdx.x * 256 + threadIdx.x;
  if (at >= fours) return;
  const float4 raw = __ldg((const float4*)x + at);
  float rest[4] = {raw.x, raw.y, raw.z, raw.w};
  const uint2 first = part_of(rest), second = part_of(rest), third = part_of(rest);
  const uint2 in_order[4] = {first, first, second, third};
  u16* to = parts + (long long)(at / (C / 4)) * row + at % (C / 4) * 4;
#pragma unroll
  for (int i = 0; i < 4; i++) *(uint2*)(to + (long long)(reversed ? 3 - i : i) * block) = in_order[i];
}
