#include "attention.h"

#include <algorithm>

#include "../kernels/table.h"
#include "scratch.h"

namespace secateur {
namespace {

// Every task packs the keys and values of its head, so it has this many queries if there are.
constexpr int64_t kQueriesOfTask = 128;
constexpr int64_t kMost = int64_t{1} << 31;

void check(const secateur_attention &a) {
  const auto within = [](const char *what, int64_t value, int64_t least, int64_t most) {
    if (value >= least && value <= most) return;
    throw Error(SECATEUR_INVALID, std::string("attention: ") + what + " is " + std::to_string(value) +
                                      "; it must be from " + std::to_string(least) + " to " +
                                      std::to_string(most));
  };
  within("batch", a.batch, 0, kMost);
  within("queries", a.queries, 0, kMost);
  within("keys", a.keys, 1, kMost / 64);
  within("heads", a.heads, 1, 1 << 20);
  within("size", a.size, 1, 1 << 16);
  within("value_size", a.value_size, 1, 1 << 16);
  if (a.mask_batch != 1) within("mask_batch", a.mask_batch, a.batch, a.batch);
  if (a.mask_heads != 1) within("mask_heads", a.mask_heads, a.heads, a.heads);
}

}  // namespace

void attend(const secateur_attention &a, const AttentionArrays &arrays, const KernelTable &table,
            const Parallel &asked) {
  check(a);
  const Parallel parallel = {asked.run, asked.context, std::max(1, asked.threads)};
  const int64_t blocks = (a.queries + kQueriesOfTask - 1) / kQueriesOfTask;
  const int64_t width = int64_t{a.heads} * a.size, value_width = int64_t{a.heads} * a.value_size;
  parallel(static_cast<size_t>(a.batch * a.heads * blocks), [&](size_t task) {
    thread_local Scratch scratch;
    const int64_t n = static_cast<int64_t>(task) / (a.heads * blocks);
    const int64_t head = static_cast<int64_t>(task) / blocks % a.heads;
    const int64_t first = static_cast<int64_t>(task) % blocks * kQueriesOfTask;
    const int64_t rows = std::min(kQueriesOfTask, a.queries - first);
    const int64_t query = n * a.queries + first, key = n * a.keys;
    const int64_t mask_of = (a.mask_batch == 1 ? 0 : n) * a.mask_heads + (a.mask_heads == 1 ? 0 : head);
    AttentionWork work = {
        arrays.q + query * width + head * a.size,
        arrays.k + key * width + head * a.size,
        arrays.v + key * value_width + head * a.value_size,
        arrays.mask ? arrays.mask + (mask_of * a.queries + first) * a.keys : nullptr,
        arrays.y + query * value_width + head * a.value_size,
        nullptr,
        width,
        value_width,
        static_cast<int32_t>(rows),
        static_cast<int32_t>(a.keys),
        a.size,
        a.value_size,
        a.scale,
    };
    work.scratch = scratch.floats(static_cast<size_t>(table.attention_scratch(work)));
    table.attention(work);
  });
}

}  // namespace secateur
