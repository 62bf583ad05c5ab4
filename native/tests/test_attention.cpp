// Attention against its definition in double precision, on every instruction set that runs here.
//
// The bound: a score is a sum of `size` products, so it is off by at most (size + 3) * eps times the sum
// of their sizes, and by two roundings of the mask and of the score itself; an exponential carries that
// over as a relative error, adds the rounding of its argument and 2 units in the last place, and appears
// above and below; sums of `keys` terms add keys * eps each.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/table.h"
#include "layer/attention.h"

using namespace secateur;

namespace {

constexpr size_t kGuard = 64;
constexpr float kMark = 12345.0f;
constexpr double kEps = 5.9604644775390625e-08;
int failures = 0;

void expect(bool good, const std::string &what) {
  if (good) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

struct Case {
  secateur_attention sizes;
  bool masked;
  std::vector<float> q, k, v, mask;

  size_t outputs() const {
    return static_cast<size_t>(sizes.batch * sizes.queries * sizes.heads * sizes.value_size);
  }
  std::string name(const KernelTable &table) const {
    const auto n = [](int64_t value) { return std::to_string(value) + " "; };
    return std::string(table.name) + ", attention " + n(sizes.batch) + n(sizes.queries) +
           n(sizes.keys) + n(sizes.heads) + n(sizes.size) + n(sizes.value_size);
  }
  void run(const KernelTable &table, float *y) const {
    attend(sizes, {q.data(), k.data(), v.data(), masked ? mask.data() : nullptr, y}, table,
           {nullptr, nullptr, 2});
  }
};

std::vector<float> numbers(std::mt19937 &random, size_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> all(count);
  for (float &value : all) value = normal(random);
  return all;
}

Case make(std::mt19937 &random, secateur_attention sizes, bool masked) {
  const size_t width = size_t(sizes.heads) * sizes.size, to = size_t(sizes.heads) * sizes.value_size;
  Case c = {sizes, masked, numbers(random, sizes.batch * sizes.queries * width),
            numbers(random, sizes.batch * sizes.keys * width),
            numbers(random, sizes.batch * sizes.keys * to), {}};
  if (!masked) return c;
  c.mask = numbers(random, sizes.mask_batch * sizes.mask_heads * sizes.queries * sizes.keys);
  for (size_t i = 0; i < c.mask.size(); ++i) {  // the first key is always seen
    if (i % sizes.keys && random() % 3 == 0) {
      c.mask[i] = random() % 2 ? -std::numeric_limits<float>::infinity()
                               : std::numeric_limits<float>::lowest();
    }
  }
  return c;
}

// How many outputs are outside of the bound.
int outside(const Case &c, const float *y) {
  const secateur_attention &a = c.sizes;
  const int64_t width = int64_t{a.heads} * a.size, to = int64_t{a.heads} * a.value_size;
  int wrong = 0;
  std::vector<double> p(a.keys), error(a.keys);
  for (int64_t n = 0; n < a.batch; ++n) {
    for (int64_t h = 0; h < a.heads; ++h) {
      const int64_t of_mask = (a.mask_batch == 1 ? 0 : n) * a.mask_heads + (a.mask_heads == 1 ? 0 : h);
      for (int64_t i = 0; i < a.queries; ++i) {
        double most = -INFINITY, sum = 0, off = 0;
        for (int64_t j = 0; j < a.keys; ++j) {
          double score = 0, size = 0;
          for (int64_t d = 0; d < a.size; ++d) {
            const double product = double(c.q[(n * a.queries + i) * width + h * a.size + d]) *
                                   c.k[(n * a.keys + j) * width + h * a.size + d];
            score += product, size += std::fabs(product);
          }
          const double added = c.masked ? c.mask[(of_mask * a.queries + i) * a.keys + j] : 0;
          p[j] = score * a.scale + added;
          error[j] = kEps * ((a.size + 3) * std::fabs(a.scale) * size + 2 * std::fabs(added) +
                             2 * std::fabs(p[j]));
          most = std::max(most, p[j]);
        }
        for (int64_t j = 0; j < a.keys; ++j) {
          const double distance = most - p[j];
          p[j] = std::exp(-distance), sum += p[j];
          if (p[j] > 1e-37) off = std::max(off, error[j] + kEps * distance);
        }
        for (int64_t d = 0; d < a.value_size; ++d) {
          double value = 0, size = 0;
          for (int64_t j = 0; j < a.keys; ++j) {
            const double share = p[j] / sum, v = c.v[(n * a.keys + j) * to + h * a.value_size + d];
            value += share * v, size += share * std::fabs(v);
          }
          const double bound = 1.1 * size * (4 * off + kEps * (2 * double(a.keys) + 12)) + 1e-36;
          const double got = y[(n * a.queries + i) * to + h * a.value_size + d];
          wrong += !(std::fabs(got - value) <= bound);
        }
      }
    }
  }
  return wrong;
}

void compare(const KernelTable &table, const Case &c) {
  const size_t total = c.outputs();
  std::vector<float> y(total + 2 * kGuard, std::numeric_limits<float>::quiet_NaN());
  for (size_t i = 0; i < kGuard; ++i) y[i] = y[kGuard + total + i] = kMark;
  // Exactly as large as needed, so that the address sanitizer sees any step outside.
  const auto tight = std::make_unique<float[]>(total);
  c.run(table, y.data() + kGuard);
  c.run(table, tight.get());
  const int wrong = outside(c, y.data() + kGuard) + outside(c, tight.get());
  expect(wrong == 0, c.name(table) + ": " + std::to_string(wrong) + " outside the bound");
  bool guards = true;
  for (size_t i = 0; i < kGuard; ++i) guards &= y[i] == kMark && y[kGuard + total + i] == kMark;
  expect(guards, c.name(table) + ": wrote outside");
}

void special(const KernelTable &table, std::mt19937 &random) {
  Case c = make(random, {1, 3, 20, 2, 5, 4, 0.4f, 1, 1}, true);
  const float inf = std::numeric_limits<float>::infinity();
  for (int j = 0; j < 20; ++j) c.mask[20 + j] = -inf;  // the second query sees nothing
  c.q[2 * 10] = std::nanf("");                         // the third is no number in the first head
  std::vector<float> y(c.outputs());
  c.run(table, y.data());
  for (int d = 0; d < 8; ++d) {
    expect(std::isfinite(y[d]), c.name(table) + ": a query that is whole");
    expect(std::isnan(y[8 + d]), c.name(table) + ": a query that sees nothing");
    expect(std::isnan(y[16 + d]) == (d < 4), c.name(table) + ": NaN stays in its head");
  }
  // What is hidden has no share at all, whatever its size.
  c = make(random, {1, 1, 2, 1, 4, 3, 1.0f, 1, 1}, true);
  c.mask = {0, -inf};
  for (int d = 0; d < 3; ++d) c.v[3 + d] = 1e38f;
  c.run(table, y.data());
  for (int d = 0; d < 3; ++d) expect(y[d] == c.v[d], c.name(table) + ": a hidden value");
}

void refused(const KernelTable &table) {
  const secateur_attention wrong[] = {{1, 1, 0, 1, 1, 1, 1, 1, 1}, {1, 1, 1, 0, 1, 1, 1, 1, 1},
                                      {1, 1, 1, 1, 0, 1, 1, 1, 1}, {3, 1, 1, 1, 1, 1, 1, 2, 1},
                                      {1, 1, 1, 4, 1, 1, 1, 1, 2}, {-1, 1, 1, 1, 1, 1, 1, 1, 1}};
  for (const secateur_attention &sizes : wrong) {
    try {
      attend(sizes, {}, table, {});
      expect(false, "sizes that make no sense were taken");
    } catch (const Error &error) {
      expect(error.code == SECATEUR_INVALID, "another code");
    }
  }
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (const KernelTable *table : secateur::tables()) {
    const char *forced = std::getenv("SECATEUR_ISA");
    if (forced && std::strcmp(forced, table->name) != 0) continue;
    for (const int64_t keys : {1, 3, 8, 15, 16, 17, 64, 65, 200}) {
      for (const int32_t size : {1, 7, 16, 32, 33, 64, 80}) {
        const int64_t queries = 1 + (keys * 5 + size) % 14;
        const int32_t to = size % 3 ? size : 2 * size + 1;
        compare(*table, make(random, {1, queries, keys, 2, size, to, 1 / std::sqrt(float(size)), 1, 1},
                             keys % 2 == 0));
      }
    }
    for (const int64_t batch : {1, 3}) {
      for (const int32_t heads : {1, 4}) {
        compare(*table, make(random, {3, 130, 19, 4, 12, 12, 0.3f, batch, heads}, true));
      }
    }
    Case planted = make(random, {1, 9, 21, 2, 8, 8, 0.5f, 1, 1}, false);
    std::vector<float> y(planted.outputs());
    planted.run(*table, y.data());
    planted.k[100] += 1e-3f;
    expect(outside(planted, y.data()) > 0, planted.name(*table) + ": a planted error was not found");
    special(*table, random);
    refused(*table);
  }
  std::printf("%d failed\n", failures);
  return failures ? 1 : 0;
}
