#include "layer/gemv.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "layer/scratch.h"

namespace secateur {
namespace {

// Below this many bytes of weights a task costs more to hand out than it saves.
constexpr int64_t kBytesPerTask = 32 << 10;
constexpr size_t kHugePage = 2 << 20;
// More tasks than threads, so that a thread that was held up does not hold up the others.
constexpr int64_t kTasksPerThread = 4;

float activate(const secateur_spec &spec, float y) {
  // Comparisons are written so that NaN passes through.
  switch (spec.activation) {
    case SECATEUR_RELU:
      return y < 0 ? 0.0f : y;
    case SECATEUR_CLIP:
      return y < spec.alpha ? spec.alpha : y > spec.beta ? spec.beta : y;
    case SECATEUR_GELU:
      return 0.5f * y * (1.0f + std::erf(y * 0.70710678f));
    case SECATEUR_SILU:
      return y / (1.0f + std::exp(-y));
    case SECATEUR_HARDSWISH: {
      const float gate = y / 6.0f + 0.5f;
      return y * (gate < 0 ? 0.0f : gate > 1 ? 1.0f : gate);
    }
    default:
      return y;
  }
}

}  // namespace

Block::Block(size_t bytes) : bytes_(bytes) {
  const size_t page = bytes < kHugePage ? 64 : kHugePage;
  const size_t rounded = (bytes + page - 1) / page * page;
  data_.reset(static_cast<char *>(std::aligned_alloc(page, rounded ? rounded : page)));
  if (!data_) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (page == kHugePage) madvise(data_.get(), rounded, MADV_HUGEPAGE);  // refused: small pages
#endif
  std::memset(data_.get(), 0, rounded);
}

void Block::Free::operator()(char *data) const { std::free(data); }

Gemv::Gemv(const secateur_spec &spec, const Weights &weights, int dtype, GemvKernel f32,
           GemvKernel bf16)
    : spec_(spec),
      kernel_(dtype == SECATEUR_BFLOAT16 ? bf16 : f32),
      outputs_(weights.rows),
      inputs_(weights.columns),
      groups_((weights.columns + kGemvGroup - 1) / kGemvGroup),
      blocks_((weights.rows + kGemvRows - 1) / kGemvRows),
      value_bytes_(dtype == SECATEUR_BFLOAT16 ? 2 : 4),
      masks_(static_cast<size_t>(blocks_ * groups_ * kGemvRows) * sizeof(uint64_t)),
      values_(static_cast<size_t>(weights.nonzeros() * value_bytes_ + kGemvSpareBytes)),
      bias_(weights.bias) {
  uint64_t *mask = reinterpret_cast<uint64_t *>(masks_.data());
  char *value = values_.data();
  for (int64_t block = 0; block < blocks_; ++block) {
    const int64_t first = block * kGemvRows;
    int64_t next[kGemvRows];  // the first entry of each row that is still to come
    for (int64_t r = 0; r < kGemvRows; ++r) {
      next[r] = weights.starts[std::min(first + r, outputs_)];
    }
    starts_.push_back(next[0]);
    for (int64_t group = 0; group < groups_; ++group) {
      for (int64_t r = 0; r < kGemvRows; ++r, ++mask) {
        const int64_t row = first + r, end = row < outputs_ ? weights.starts[row + 1] : 0;
        for (int64_t &i = next[r]; i < end; ++i) {
          const int64_t bit = weights.column[i] - group * kGemvGroup;
          if (bit >= kGemvGroup) break;
          *mask |= uint64_t{1} << bit;
          value = append(value, weights.value[i], row, weights.column[i]);
        }
      }
    }
  }
  starts_.push_back(weights.nonzeros());
}

char *Gemv::append(char *to, float value, int64_t row, int64_t column) const {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value_bytes_ == 4) {
    std::memcpy(to, &bits, 4);
    return to + 4;
  }
  if (bits & 0xffff) {
    throw Error(SECATEUR_INVALID,
                "weights held as bfloat16: the weight of row " + std::to_string(row) +
                    ", column " + std::to_string(column) +
                    " is not a bfloat16 number. Holding it would change it. Ask for float32, or "
                    "round the weights first.");
  }
  const uint16_t upper = static_cast<uint16_t>(bits >> 16);
  std::memcpy(to, &upper, 2);
  return to + 2;
}

int64_t Gemv::bytes() const {
  return static_cast<int64_t>(masks_.size() + values_.size() +
                              starts_.size() * sizeof(int64_t) + bias_.size() * sizeof(float));
}

// Where the tasks begin and end: about equally many bytes of weights in each.
std::vector<int64_t> Gemv::split(int threads) const {
  const int64_t masks = groups_ * kGemvRows * 8;
  const auto bytes = [&](int64_t block) { return starts_[block] * value_bytes_ + block * masks; };
  const int64_t all = bytes(blocks_);
  int64_t tasks = threads > 1 ? threads * kTasksPerThread : 1;
  tasks = std::max<int64_t>(1, std::min({tasks, all / kBytesPerTask, blocks_}));
  std::vector<int64_t> edges(1, 0);
  for (int64_t task = 1; task < tasks; ++task) {
    int64_t low = edges.back(), high = blocks_;
    while (low < high) {  // the first block that begins at or behind this share
      const int64_t middle = (low + high) / 2;
      if (bytes(middle) < all / tasks * task) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    edges.push_back(low);
  }
  edges.push_back(blocks_);
  return edges;
}

void Gemv::blocks(const float *x, int64_t tokens, const float *residual, float *y, int64_t begin,
                  int64_t end) const {
  GemvRows task;
  task.masks = reinterpret_cast<const uint64_t *>(masks_.data());
  task.groups = groups_;
  task.values = values_.data();
  task.starts = starts_.data();
  task.begin = begin;
  task.end = end;
  task.rows = outputs_;
  task.columns = task.x_stride = inputs_;
  task.y_stride = outputs_;
  task.plain = plain_;
  thread_local Scratch packed;
  task.scratch = packed.floats(static_cast<size_t>(kGemvTokens * groups_ * kGemvGroup));
  const int64_t first_row = begin * kGemvRows, end_row = std::min(end * kGemvRows, outputs_);
  for (int64_t first = 0; first < tokens; first += kGemvTokens) {
    task.tokens = static_cast<int>(std::min<int64_t>(tokens - first, kGemvTokens));
    task.x = x + first * inputs_;
    task.y = y + first * outputs_;
    kernel_(task);
    for (int64_t t = first; t < first + task.tokens; ++t) {
      for (int64_t row = first_row; row < end_row; ++row) {
        const int64_t at = t * outputs_ + row;
        y[at] = activate(spec_, y[at] + bias_[row] + (residual ? residual[at] : 0.0f));
      }
    }
  }
}

void Gemv::run(const float *x, int64_t tokens, const float *residual, float *y,
               const Parallel &parallel) const {
  const std::vector<int64_t> edges = split(parallel.threads);
  parallel(edges.size() - 1,
           [&](size_t task) { blocks(x, tokens, residual, y, edges[task], edges[task + 1]); });
}

}  // namespace secateur
