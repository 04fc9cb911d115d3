// What tch has no call for, over libtorch's own dispatcher: attention that returns its log-sum-exp, tensors in memory of
// another's, the allocator, and a trace of what the device does. Needs no CUDA header and links to no CUDA library: libtorch_cuda registers itself when it is loaded.
// Every function returns null, or the text of the error, which lives until the thread's next call.
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <torch/csrc/autograd/profiler_kineto.h>
#include <set>
#include <string>

static thread_local std::string error;

template <typename Work>
static const char* guarded(Work work) {
  try {
    work();
    return nullptr;
  } catch (const std::exception& caught) {
    error = caught.what();
    return error.c_str();
  }
}

extern "C" {

// out: attention [B, H, S, Dv], and log-sum-exp; the caller owns the two.
const char* tiefsee_cudnn_attention(const at::Tensor* q, const at::Tensor* k, const at::Tensor* v, bool causal, double scale,
                                    at::Tensor** out) {
  return guarded([&] {
    auto made = at::_scaled_dot_product_cudnn_attention(*q, *k, *v, std::nullopt, true, 0.0, causal, false, scale);
    out[0] = new at::Tensor(std::get<0>(made));
    out[1] = new at::Tensor(std::get<1>(made));
  });
}

// out: bytes [N] at `data`, on GPU `device` or, below 0, on the host; `drop(owner)` is called once the last tensor there is
// gone, or none could be made. The caller owns out.
const char* tiefsee_wrap(void* data, int64_t bytes, int device, void* owner, void (*drop)(void*), at::Tensor** out) {
  return guarded([&] {
    const auto on = device < 0 ? c10::Device(c10::kCPU) : c10::Device(c10::kCUDA, (c10::DeviceIndex)device);
    const auto options = at::TensorOptions(at::kByte).device(on);
    *out = new at::Tensor(at::for_blob(data, {bytes}).context(owner, drop).options(options).target_device(on).make_tensor());
  });
}

// Gives back what the allocator keeps for later.
const char* tiefsee_empty_cache() {
  return guarded([] { c10::getDeviceAllocator(c10::DeviceType::CUDA)->emptyCache(); });
}

// bytes: allocated now, allocated at most, reserved now.
const char* tiefsee_memory(int device, int64_t* bytes) {
  return guarded([&] {
    const auto stats = c10::getDeviceAllocator(c10::DeviceType::CUDA)->getDeviceStats((c10::DeviceIndex)device);
    bytes[0] = stats.allocated_bytes[0].current;
    bytes[1] = stats.allocated_bytes[0].peak;
    bytes[2] = stats.reserved_bytes[0].current;
  });
}

const char* tiefsee_reset_peak(int device) {
  return guarded([&] { c10::getDeviceAllocator(c10::DeviceType::CUDA)->resetPeakStats((c10::DeviceIndex)device); });
}

// Everything the device does from here to tiefsee_profile_stop, which writes it as a Chrome trace.
const char* tiefsee_profile_start() {
  return guarded([] {
    using namespace torch::profiler::impl;
    const ProfilerConfig config(ProfilerState::KINETO);
    const std::set<ActivityType> activities{ActivityType::CUDA};
    torch::autograd::profiler::prepareProfiler(config, activities);
    torch::autograd::profiler::enableProfiler(config, activities);
  });
}

const char* tiefsee_profile_stop(const char* path) {
  return guarded([&] { torch::autograd::profiler::disableProfiler()->save(path); });
}
}
