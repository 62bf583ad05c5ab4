// A layer ready to run: its weights, its variant, and a plan for every size of input it has met.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <tuple>

#include "../isa.h"
#include "band.h"
#include "depthwise.h"
#include "gemv.h"
#include "spec.h"
#include "stream.h"
#include "tiling.h"

namespace secateur {

class Layer {
 public:
  Layer(const secateur_spec &spec, const secateur_weights &stored, const secateur_variant &variant,
        const KernelTable &table);

  // Of a linear layer: what it puts out is normalised from now on, token by token.
  void normalise(const float *scale, const float *shift, float epsilon);
  void shape(const int64_t dims[3], int64_t out[3]) const;
  void run(const float *x, const int64_t dims[3], const float *residual, float *y,
           const Parallel &asked) const;
  // Whether a part of the rows of an image can be computed from a part of those of the input, with all
  // channels at hand: depthwise layers, and convolutions that look at one pixel each.
  bool takes_bands() const;
  // On the calling thread.
  void run_band(const Band &band) const;
  const secateur_spec &spec() const { return spec_; }
  int64_t nonzeros() const { return nonzeros_; }
  int64_t bytes() const;

 private:
  struct Plan {
    Tiling tiling;
    std::shared_ptr<const Streams> streams;
  };
  struct Task;

  void norm(float *y, int64_t tokens) const;
  std::shared_ptr<const Plan> plan(const int64_t dims[3], int threads) const;
  void run_task(const Plan &plan, const Task &task) const;

  secateur_spec spec_;
  secateur_variant variant_;
  const KernelTable &table_;
  Weights weights_;  // empty for GEMV and DEPTHWISE
  int64_t nonzeros_;
  std::vector<float> scale_, shift_;  // empty: y is not normalised
  float epsilon_ = 0;
  std::unique_ptr<Gemv> gemv_;
  std::unique_ptr<Depthwise> depthwise_;
  // Streams depend on the tile's shape alone, so that sequences of many lengths share them.
  using Shape = std::tuple<int, int32_t, int32_t, int64_t, int>;
  mutable std::mutex mutex_;
  mutable std::map<Shape, std::shared_ptr<const Streams>> streams_;
  mutable std::map<std::tuple<int64_t, int64_t, int64_t, int>, std::shared_ptr<const Plan>> plans_;
};

// Variants worth timing, best guess first.
std::vector<secateur_variant> candidates(const secateur_spec &spec, int64_t positions,
                                         double density, const KernelTable &table);

}  // namespace secateur
