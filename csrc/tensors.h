// What the operators need from torch::stable::Tensor: dense allocation and checked pointers.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <vector>

#include "dtype.h"

namespace attbalance {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename A>
constexpr ScalarType kScalarType = sizeof(A) == 4 ? ScalarType::Float : ScalarType::Double;

inline ScalarType scalar_type(Dtype dtype) {
    switch (dtype) {
        case Dtype::kFloat32: return ScalarType::Float;
        case Dtype::kBFloat16: return ScalarType::BFloat16;
        case Dtype::kFloat16: return ScalarType::Half;
        case Dtype::kFloat64: return ScalarType::Double;
    }
    STD_TORCH_CHECK(false, "attbalance_ext: unknown dtype code ", static_cast<int>(dtype));
}

inline Dtype dtype_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float: return Dtype::kFloat32;
        case ScalarType::BFloat16: return Dtype::kBFloat16;
        case ScalarType::Half: return Dtype::kFloat16;
        case ScalarType::Double: return Dtype::kFloat64;
        default: STD_TORCH_CHECK(false, "attbalance_ext: keys must be float32, bfloat16, float16 or float64");
    }
}

inline int64_t element_bytes(Dtype dtype) {
    return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

/// Where a tensor's memory is, in the shim's terms.
struct Place {
    int32_t device_type = aoti_torch_device_type_cpu();
    int32_t device_index = 0;
};

/// An uninitialised tensor with these strides (elements).
inline Tensor empty_strided(std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
                            ScalarType dtype, Place place = {}) {
    const int32_t shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                    strides.begin(), shim_dtype, place.device_type,
                                                    place.device_index, &handle));
    return Tensor(handle);
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, Place place = {}) {
    const int64_t* size = sizes.begin();
    switch (sizes.size()) {
        case 0: return empty_strided({}, {}, dtype, place);
        case 1: return empty_strided(sizes, {1}, dtype, place);
        case 2: return empty_strided(sizes, {size[1], 1}, dtype, place);
        case 3: return empty_strided(sizes, {size[1] * size[2], size[2], 1}, dtype, place);
        case 4:
            return empty_strided(sizes, {size[1] * size[2] * size[3], size[2] * size[3], size[3], 1}, dtype,
                                 place);
        default: STD_TORCH_CHECK(false, "attbalance_ext: at most 4 dimensions");
    }
}

/// The values, unchecked: see `check`. Reading through `const T` leaves a lazily copied tensor shared.
template <typename T>
T* data(const Tensor& tensor) {
    if constexpr (std::is_const_v<T>) {
        return static_cast<T*>(tensor.const_data_ptr());
    } else {
        return static_cast<T*>(tensor.mutable_data_ptr());
    }
}

/// Raise unless `tensor` is there.
inline void check_place(const Tensor& tensor, const char* name, Place place) {
    int32_t type = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    STD_TORCH_CHECK(type == place.device_type && (type == aoti_torch_device_type_cpu() ||
                                                  tensor.get_device_index() == place.device_index),
                    "attbalance_ext: ", name, " is on another device than the op runs on");
}

/// Raise unless `tensor` is contiguous, there, of this type and of these sizes. The Python layer checks what
/// users pass; this guards the operators themselves, which anyone may call.
inline void check(const Tensor& tensor, const char* name, ScalarType dtype,
                  std::initializer_list<int64_t> sizes, Place place = {}) {
    check_place(tensor, name, place);
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, "attbalance_ext: ", name, " has the wrong dtype");
    STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(sizes.size()), "attbalance_ext: ", name,
                    " has the wrong number of dimensions");
    int64_t i = 0;
    for (const int64_t size : sizes) {
        STD_TORCH_CHECK(tensor.size(i) == size, "attbalance_ext: ", name, " has size ", tensor.size(i),
                        " in dimension ", i, ", expected ", size);
        ++i;
    }
    STD_TORCH_CHECK(tensor.is_contiguous(), "attbalance_ext: ", name, " must be contiguous");
}

}  // namespace attbalance
