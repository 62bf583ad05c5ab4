// What all operators share beside their nodes: how ONNX Runtime is told of them, its threads, and the
// version of the files.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif

#include "node.h"

namespace secateur::ops {

// secateur.runtime.session writes it: ONNX Runtime does not tell operators how many threads it has.
constexpr const char *THREADS_ENTRY = "secateur.threads";
constexpr int MAX_THREADS = 1024;

// One of our operators, as one copy of ONNX Runtime knows it.
struct Operator : ort::CustomOp {
  const char *name = nullptr;
  bool has_config_entries = false;
};

inline int processors() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

inline int threads_of(const Node &node, bool has_config_entries) {
  const int here = processors();
  if (!has_config_entries) return here;
  const int asked = std::atoi(node.config_entry(THREADS_ENTRY).c_str());
  return asked > 0 ? std::min(asked, MAX_THREADS) : here;
}

inline void require_version(const Node &node) {
  const int32_t abi = node.integer("abi");
  if (abi != SECATEUR_ABI) {
    throw Refusal{ort::INVALID_GRAPH,
                  node.who() + ": the file was written for version " + std::to_string(abi) +
                      " of the operators, and this library has version " +
                      std::to_string(SECATEUR_ABI) +
                      ". Install the secateur that wrote it, or write it again with this one."};
  }
}

// ONNX Runtime's threads, as calls of secateur.h want them.
struct Spread {
  const ort::Api &api;
  ort::KernelContext *context;
  ort::Status *status = nullptr;

  static void run(void *self, void (*task)(void *, size_t), size_t count, void *user) {
    Spread &spread = *static_cast<Spread *>(self);
    spread.keep(spread.api.KernelContext_ParallelFor(spread.context, task, count, 0, user));
  }

  // The first error is the one that is told.
  void keep(ort::Status *found) {
    if (!status) {
      status = found;
    } else if (found) {
      api.ReleaseStatus(found);
    }
  }
};

// Tells the error of a call of secateur.h.
inline void require_ok(const std::string &who, int code, ort::ErrorCode otherwise) {
  if (code == SECATEUR_OK) return;
  throw Refusal{code == SECATEUR_NO_MEMORY ? ort::FAIL : otherwise,
                who + ": " + secateur_last_error() + "."};
}

// What every kernel has, and how it ends.
struct KernelBase {
  const ort::Api *api;
  int threads;
  std::string who;

  KernelBase(const ort::Api &its_api, const Operator &op, const Node &node)
      : api(&its_api), threads(threads_of(node, op.has_config_entries)), who(node.who()) {
    require_version(node);
  }

  [[noreturn]] void refuse(const std::string &found) const {
    throw Refusal{ort::INVALID_ARGUMENT, who + ": " + found};
  }

  float *output(ort::KernelContext *context, const std::vector<int64_t> &shape) const {
    ort::Value *value = nullptr;
    void *y = nullptr;
    require(*api, api->KernelContext_GetOutput(context, 0, shape.data(), shape.size(), &value), who);
    require(*api, api->GetTensorMutableData(value, &y), who);
    return static_cast<float *>(y);
  }

  // call(parallel, context, threads) of secateur.h on ONNX Runtime's threads.
  template <typename Call>
  void on_threads(ort::KernelContext *context, Call call) const {
    Spread spread{*api, context};
    const int code = call(threads > 1 ? Spread::run : nullptr, &spread, threads);
    require(*api, spread.status, who);
    require_ok(code, ort::INVALID_ARGUMENT);
  }

  void require_ok(int code, ort::ErrorCode otherwise) const {
    ops::require_ok(who, code, otherwise);
  }
};

inline const float *floats(const Tensor &tensor) { return static_cast<const float *>(tensor.data); }

// An operator whose kernels are of a type with INPUTS, REQUIRED, input_type(), make() and run(). What is
// stated here ONNX Runtime checks before it makes a kernel; UNDEFINED stands for any type, and then we
// check.
template <typename Kernel>
Operator make_operator(const char *name, bool has_config_entries) {
  Operator op = {};
  op.version = ort::VERSION;
  op.name = name;
  op.has_config_entries = has_config_entries;
  op.GetName = [](const ort::CustomOp *self) { return static_cast<const Operator *>(self)->name; };
  op.GetExecutionProviderType = [](const ort::CustomOp *) { return "CPUExecutionProvider"; };
  op.GetInputTypeCount = [](const ort::CustomOp *) -> size_t { return Kernel::INPUTS; };
  op.GetInputType = [](const ort::CustomOp *, size_t index) -> ort::ElementType {
    return Kernel::input_type(index);
  };
  op.GetInputCharacteristic = [](const ort::CustomOp *, size_t index) -> ort::Characteristic {
    return index >= Kernel::REQUIRED ? ort::OPTIONAL : ort::REQUIRED;
  };
  op.GetOutputTypeCount = [](const ort::CustomOp *) -> size_t { return 1; };
  op.GetOutputType = [](const ort::CustomOp *, size_t) -> ort::ElementType { return ort::FLOAT; };
  op.GetOutputCharacteristic = [](const ort::CustomOp *, size_t) -> ort::Characteristic {
    return ort::REQUIRED;
  };
  op.GetInputMemoryType = [](const ort::CustomOp *, size_t) -> int32_t { return 0; };
  op.GetStartVersion = [](const ort::CustomOp *) { return 1; };
  op.GetEndVersion = [](const ort::CustomOp *) { return std::numeric_limits<int>::max(); };
  op.CreateKernelV2 = [](const ort::CustomOp *self, const ort::Api *api,
                         const ort::KernelInfo *info, void **out) -> ort::Status * {
    *out = nullptr;
    return guarded(*api, [&] {
      *out = Kernel::make(*static_cast<const Operator *>(self), *api, info).release();
    });
  };
  op.KernelComputeV2 = [](void *self, ort::KernelContext *context) -> ort::Status * {
    const Kernel &kernel = *static_cast<const Kernel *>(self);
    return guarded(*kernel.api, [&] { kernel.run(context); });
  };
  op.KernelDestroy = [](void *kernel) { delete static_cast<Kernel *>(kernel); };
  return op;
}

}  // namespace secateur::ops
