// What the operators of ops.cpp share: errors that become statuses, tensors, and the reading of a
// node while its kernel is made.
#pragma once

#include <cstdint>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "ort.h"
#include "secateur.h"

namespace secateur::ops {

constexpr const char *AGAIN = " Write the file again: secateur compile.";

// An error on its way to the C interface, where it becomes a status.
struct Refusal {
  ort::ErrorCode code;
  std::string message;
};

// Runs a function that may throw and turns what it throws into a status.
template <typename Function>
ort::Status *guarded(const ort::Api &api, Function &&function) noexcept {
  try {
    function();
    return nullptr;
  } catch (const Refusal &refusal) {
    return api.CreateStatus(refusal.code, refusal.message.c_str());
  } catch (const std::bad_alloc &) {
    return api.CreateStatus(ort::FAIL, "secateur: there is not enough memory.");
  } catch (const std::exception &error) {
    return api.CreateStatus(ort::FAIL, error.what());
  } catch (...) {
    return api.CreateStatus(ort::FAIL, "secateur: an unknown error.");
  }
}

inline void require(const ort::Api &api, ort::Status *status, const std::string &what) {
  if (!status) return;
  const std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw Refusal{ort::FAIL, what + ": " + message};
}

// For calls whose failure is an answer.
inline bool succeeded(const ort::Api &api, ort::Status *status) {
  if (!status) return true;
  api.ReleaseStatus(status);
  return false;
}

inline std::string text(const std::vector<int64_t> &dims) {
  std::string out = "[";
  for (size_t i = 0; i < dims.size(); ++i) out += (i ? ", " : "") + std::to_string(dims[i]);
  return out + "]";
}

struct Tensor {
  ort::ElementType type = ort::UNDEFINED;
  std::vector<int64_t> dims;
  void *data = nullptr;
};

inline Tensor read_tensor(const ort::Api &api, const ort::Value *value, const std::string &who) {
  Tensor out;
  ort::TensorInfo *info = nullptr;
  require(api, api.GetTensorTypeAndShape(value, &info), who);
  const std::unique_ptr<ort::TensorInfo, void (*)(ort::TensorInfo *)> release(
      info, api.ReleaseTensorTypeAndShapeInfo);
  size_t rank = 0;
  require(api, api.GetTensorElementType(info, &out.type), who);
  require(api, api.GetDimensionsCount(info, &rank), who);
  out.dims.resize(rank);
  require(api, api.GetDimensions(info, out.dims.data(), rank), who);
  // The table has one call for reading and writing, hence the cast.
  require(api, api.GetTensorMutableData(const_cast<ort::Value *>(value), &out.data), who);
  return out;
}

// Reads what a node says, while its kernel is made.
class Node {
 public:
  Node(const ort::Api &api, const ort::KernelInfo *info, const char *operator_name)
      : api_(api), info_(info) {
    who_ = std::string(operator_name) + " '" +
           name([&](char *out, size_t *size) {
             return api_.KernelInfo_GetNodeName(info_, out, size);
           }) +
           "'";
    require(api_, api_.KernelInfo_GetInputCount(info_, &inputs_), who_);
  }

  const std::string &who() const { return who_; }

  [[noreturn]] void refuse(const std::string &found) const {
    throw Refusal{ort::INVALID_GRAPH, who_ + ": " + found + AGAIN};
  }

  int32_t integer(const std::string &attribute) const {
    int64_t value = 0;
    if (!succeeded(api_, api_.KernelInfoGetAttribute_int64(info_, attribute.c_str(), &value))) {
      refuse("it has no integer attribute '" + attribute + "'.");
    }
    return narrow(attribute, value);
  }

  int32_t integer_or(const std::string &attribute, int32_t otherwise) const {
    int64_t value = 0;
    const bool given =
        succeeded(api_, api_.KernelInfoGetAttribute_int64(info_, attribute.c_str(), &value));
    return given ? narrow(attribute, value) : otherwise;
  }

  float real(const std::string &attribute) const {
    float value = 0;
    if (!succeeded(api_, api_.KernelInfoGetAttribute_float(info_, attribute.c_str(), &value))) {
      refuse("it has no float attribute '" + attribute + "'.");
    }
    return value;
  }

  template <size_t count>
  void integers(const std::string &attribute, int32_t (&out)[count]) const {
    int64_t values[count] = {};
    size_t size = 0;
    const auto read = api_.KernelInfoGetAttributeArray_int64;
    if (!succeeded(api_, read(info_, attribute.c_str(), nullptr, &size)) || size != count ||
        !succeeded(api_, read(info_, attribute.c_str(), values, &size))) {
      refuse("its attribute '" + attribute + "' is not a list of " +
             std::to_string(count) + " integers.");
    }
    for (size_t i = 0; i < count; ++i) out[i] = narrow(attribute, values[i]);
  }

  // Whether an input that may be left out is there.
  bool has(size_t input) const {
    return input < inputs_ && !name([&](char *out, size_t *size) {
                                 return api_.KernelInfo_GetInputName(info_, input, out, size);
                               }).empty();
  }

  Tensor constant(size_t input, const std::string &called) const {
    const std::string what = "its input '" + called + "'";
    int is_constant = 0;
    const ort::Value *value = nullptr;
    if (!has(input)) refuse(what + " is missing.");
    require(api_, api_.KernelInfoGetConstantInput_tensor(info_, input, &is_constant, &value), who_);
    if (!is_constant || !value) {
      refuse(what + " is not a constant. Packed weights are checked and arranged once, when the "
                    "session is made, so they must be initializers.");
    }
    Tensor tensor = read_tensor(api_, value, who_);
    if (tensor.dims.size() != 1) {
      refuse(what + " has the shape " + text(tensor.dims) + ", but it has one axis.");
    }
    return tensor;
  }

  // The value that the session's options have under a key; empty if there is none.
  std::string config_entry(const char *key) const {
    ort::KeyValuePairs *pairs = nullptr;
    require(api_, api_.KernelInfo_GetConfigEntries(info_, &pairs), who_);
    const std::unique_ptr<ort::KeyValuePairs, void (*)(ort::KeyValuePairs *)> release(
        pairs, api_.ReleaseKeyValuePairs);
    const char *value = api_.GetKeyValue(pairs, key);
    return value ? value : "";
  }

 private:
  template <typename Read>
  std::string name(Read &&read) const {
    size_t size = 0;
    if (!succeeded(api_, read(nullptr, &size)) || size < 2) return "";
    std::string out(size, '\0');
    if (!succeeded(api_, read(out.data(), &size))) return "";
    out.resize(size - 1);
    return out;
  }

  int32_t narrow(const std::string &attribute, int64_t value) const {
    if (value < std::numeric_limits<int32_t>::min() ||
        value > std::numeric_limits<int32_t>::max()) {
      refuse("its attribute '" + attribute + "' is " + std::to_string(value) +
             ", which is far out of range.");
    }
    return static_cast<int32_t>(value);
  }

  const ort::Api &api_;
  const ort::KernelInfo *info_;
  std::string who_;
  size_t inputs_ = 0;
};

}  // namespace secateur::ops
