// Tensors of the stable ABI as the CPU ops see them: metadata read once, ownership by handle.
//
// Kernels are registered unboxed by hand (a boxed function over StableIValue): a call on a tiny
// tensor is mostly overhead, and this is the cheapest boundary that works from torch 2.10 on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <utility>
#include <vector>

#include "lora_kernels/cpu.h"

namespace lora_kernels {

// Not the STABLE_ one: headers of torch before 2.13 lack it.
#define LK_ABI(call) TORCH_ERROR_CODE_CHECK(call)

// An owned tensor. Its metadata is there after read(), which refuses another device; taking the
// arguments of a call and reading them are two steps, so that a refusal leaks none of them.
class TensorArg {
 public:
  TensorArg() = default;
  explicit TensorArg(AtenTensorHandle handle) : handle_(handle) {}
  TensorArg(TensorArg&& other) noexcept { *this = std::move(other); }
  TensorArg& operator=(TensorArg&& other) noexcept {
    std::swap(handle_, other.handle_);
    data_ = other.data_;
    sizes_ = other.sizes_;
    strides_ = other.strides_;
    dim_ = other.dim_;
    type_ = other.type_;
    return *this;
  }
  TensorArg(const TensorArg&) = delete;
  TensorArg& operator=(const TensorArg&) = delete;
  ~TensorArg() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  bool defined() const { return handle_ != nullptr; }
  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t d) const { return sizes_[d]; }
  int64_t stride(int64_t d) const { return strides_[d]; }
  int32_t type() const { return type_; }
  void* data() const { return data_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t d = 0; d < dim_; d++) n *= sizes_[d];
    return n;
  }
  void read();
  bool contiguous() const {
    int64_t expected = 1;
    for (int64_t d = dim_ - 1; d >= 0; d--) {
      if (sizes_[d] != 1 && strides_[d] != expected) return numel() == 0;
      expected *= sizes_[d];
    }
    return true;
  }

 private:
  AtenTensorHandle handle_ = nullptr;
  void* data_ = nullptr;
  int64_t* sizes_ = nullptr;
  int64_t* strides_ = nullptr;
  int64_t dim_ = 0;
  int32_t type_ = 0;
};

// torch's dtype numbers, which are functions of the shim.
struct TypeCodes {
  int32_t f32 = aoti_torch_dtype_float32(), f16 = aoti_torch_dtype_float16(),
          bf16 = aoti_torch_dtype_bfloat16(), i32 = aoti_torch_dtype_int32(),
          i64 = aoti_torch_dtype_int64(), u8 = aoti_torch_dtype_uint8(),
          cpu = aoti_torch_device_type_cpu();
};
inline const TypeCodes& type_codes() {
  static const TypeCodes codes;
  return codes;
}

inline void TensorArg::read() {
  int32_t device = 0;
  LK_ABI(aoti_torch_get_device_type(handle_, &device));
  STD_TORCH_CHECK(device == type_codes().cpu, "expected every tensor on the CPU");
  LK_ABI(aoti_torch_get_dim(handle_, &dim_));
  LK_ABI(aoti_torch_get_dtype(handle_, &type_));
  LK_ABI(aoti_torch_get_sizes(handle_, &sizes_));
  LK_ABI(aoti_torch_get_strides(handle_, &strides_));
  LK_ABI(aoti_torch_get_data_ptr(handle_, &data_));
}

inline DType dtype_of(const TensorArg& t, const char* name) {
  const TypeCodes& codes = type_codes();
  if (t.type() == codes.f32) return DType::f32;
  if (t.type() == codes.bf16) return DType::bf16;
  STD_TORCH_CHECK(t.type() == codes.f16, name, ": expected float32, float16 or bfloat16");
  return DType::f16;
}

inline int32_t type_code(DType t) {
  const TypeCodes& codes = type_codes();
  return t == DType::f32 ? codes.f32 : t == DType::f16 ? codes.f16 : codes.bf16;
}

inline TensorArg new_tensor(std::initializer_list<int64_t> sizes, int32_t type) {
  int64_t size[4], stride[4], step = 1;
  int n = 0;
  for (int64_t s : sizes) size[n++] = s;
  for (int d = n - 1; d >= 0; d--) {
    stride[d] = step;
    step *= size[d] > 0 ? size[d] : 1;
  }
  AtenTensorHandle handle = nullptr;
  LK_ABI(aoti_torch_empty_strided(n, size, stride, type, type_codes().cpu, 0, &handle));
  TensorArg t(handle);
  t.read();
  return t;
}

inline TensorArg new_like(const TensorArg& t) {
  const int64_t d = t.dim();
  if (d == 1) return new_tensor({t.size(0)}, t.type());
  if (d == 2) return new_tensor({t.size(0), t.size(1)}, t.type());
  if (d == 3) return new_tensor({t.size(0), t.size(1), t.size(2)}, t.type());
  STD_TORCH_CHECK(d == 4, "expected a tensor of 1 to 4 dimensions");
  return new_tensor({t.size(0), t.size(1), t.size(2), t.size(3)}, t.type());
}

inline TensorArg contiguous_copy(const TensorArg& t) {
  TensorArg copy = new_like(t);
  LK_ABI(aoti_torch_copy_(copy.get(), t.get(), 0));
  return copy;
}

// Rows of a matrix whose last dimension is contiguous; copies (same dtype) when it is not.
inline void make_row_major(TensorArg& t) {
  const int64_t last = t.dim() - 1;
  const bool rows = (t.size(last) <= 1 || t.stride(last) == 1) &&
                    (last == 0 || t.size(0) <= 1 || t.stride(0) >= t.size(last));
  if (!rows) t = contiguous_copy(t);
}
inline void make_contiguous(TensorArg& t) {
  if (!t.contiguous()) t = contiguous_copy(t);
}

// Values of the boxed stack. Each is taken once: taking a tensor takes its reference.
inline TensorArg take_tensor(StableIValue v) {
  return TensorArg(torch::stable::detail::to<AtenTensorHandle>(v));
}
inline TensorArg take_optional(StableIValue v) {
  StableIValue* inner = torch::stable::detail::to<StableIValue*>(v);
  if (inner == nullptr) return TensorArg();
  const StableIValue value = *inner;
  delete inner;
  return take_tensor(value);
}
template <class T>
T take(StableIValue v) {
  return torch::stable::detail::to<T>(v);
}
inline std::vector<TensorArg> take_list(StableIValue v) {
  StableListHandle list = torch::stable::detail::to<StableListHandle>(v);
  std::vector<TensorArg> out;
  size_t size = 0;
  LK_ABI(torch_list_size(list, &size));
  out.reserve(size);
  for (size_t i = 0; i < size; i++) {
    StableIValue item;
    LK_ABI(torch_list_get_item(list, i, &item));
    out.push_back(take_tensor(item));
  }
  LK_ABI(torch_delete_list(list));
  return out;
}
inline StableIValue give(TensorArg&& t) { return torch::stable::detail::from(t.release()); }

}  // namespace lora_kernels
