// Which thread does which part of a run.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

namespace secateur {

// Hands out the items of a run: each thread first those of a range of its own, then what is left of
// the others'. A layer's tiles are the same positions as the next layer's, so what a thread wrote is in
// its cache when it reads it; and no two threads write into the same cache lines.
class Ranges {
 public:
  Ranges(int64_t total, int threads)
      : total_(total), count_(static_cast<int>(std::min<int64_t>({total, threads, kMost}))) {}

  // An item that nobody has taken; there is one for every call, if there are `total` calls.
  int64_t take() {
    const int own = std::this_thread::get_id() == caller_ ? 0 : 1 + slot() % std::max(1, count_ - 1);
    for (int i = 0; i < count_; ++i) {
      const int range = (own + i) % count_;
      const int64_t begin = total_ * range / count_, end = total_ * (range + 1) / count_;
      const int64_t at = begin + taken_[range].count.fetch_add(1, std::memory_order_relaxed);
      if (at < end) return at;
    }
    return -1;
  }

 private:
  static constexpr int64_t kMost = 32;
  struct alignas(64) Counter {
    std::atomic<int64_t> count{0};
  };

  // Worker threads are numbered as they come.
  static int slot() {
    static std::atomic<int> next{0};
    thread_local const int mine = next.fetch_add(1, std::memory_order_relaxed);
    return mine;
  }

  const int64_t total_;
  const int count_;
  const std::thread::id caller_ = std::this_thread::get_id();
  Counter taken_[kMost];
};

}  // namespace secateur
