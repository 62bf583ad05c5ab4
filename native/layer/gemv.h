// The layer of the family GEMV: bit masks and expanded weights, for linear layers with few tokens.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/gemv_types.h"
#include "layer/spec.h"

namespace secateur {

// Memory that starts at a cache line, filled with zeros; in huge pages where it is large and the
// system grants them: a stream then meets the end of a page five hundred times less often.
class Block {
 public:
  explicit Block(size_t bytes);
  char *data() const { return data_.get(); }
  size_t size() const { return bytes_; }

 private:
  struct Free {
    void operator()(char *data) const;
  };
  size_t bytes_;
  std::unique_ptr<char, Free> data_;
};

class Gemv {
 public:
  // dtype says how the weights are held: BFLOAT16 needs weights that bfloat16 holds exactly;
  // everything else is held as float32. f32 and bf16 are the kernels of the instruction set.
  Gemv(const secateur_spec &spec, const Weights &weights, int dtype, GemvKernel f32,
       GemvKernel bf16);

  // y = activation(weights * x + bias + residual) for row-major tokens.
  void run(const float *x, int64_t tokens, const float *residual, float *y,
           const Parallel &parallel) const;

  int64_t bytes() const;

  // Leaves out instructions beyond the set's base; for tests.
  void plain(bool on) { plain_ = on; }

 private:
  void blocks(const float *x, int64_t tokens, const float *residual, float *y, int64_t begin,
              int64_t end) const;
  char *append(char *to, float value, int64_t row, int64_t column) const;
  std::vector<int64_t> split(int threads) const;

  secateur_spec spec_;
  GemvKernel kernel_;
  bool plain_ = false;
  int64_t outputs_, inputs_, groups_, blocks_, value_bytes_;
  Block masks_, values_;
  std::vector<int64_t> starts_;  // the first value of each block, and their number
  std::vector<float> bias_;
};

}  // namespace secateur
