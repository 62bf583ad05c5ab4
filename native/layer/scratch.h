// Memory of one thread for one task, kept for the next.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace secateur {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
  ~Scratch() { std::free(at_); }

  // So many floats at a multiple of 64 bytes, zero when new: what lies past the end of a panel is
  // read into positions that nobody looks at, and must not be slow (denormal) numbers.
  float *floats(size_t count) {
    if (count > count_) {
      std::free(at_);
      count_ = 0;
      const size_t bytes = (count * sizeof(float) + 63) / 64 * 64;
      at_ = static_cast<float *>(std::aligned_alloc(64, bytes));
      if (!at_) throw std::bad_alloc();
      std::fill(at_, at_ + bytes / sizeof(float), 0.0f);
      count_ = count;
    }
    return at_;
  }

 private:
  float *at_ = nullptr;
  size_t count_ = 0;
};

}  // namespace secateur
