// Chains of layers against their definition in double precision, on every instruction set that runs here.
//
// The bound: that of a layer (see layers.cpp) with n products, (n + 4) * 2^-24 * the sum of their sizes,
// and what its input may be off by, times the sum of |w|; activations here have a slope of at most 1.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "isa.h"
#include "layer/chain.h"

using namespace secateur;

namespace {

constexpr size_t kGuard = 64;
constexpr float kMark = 12345.0f;
int failures = 0;

void expect(bool good, const std::string &what) {
  if (good) return;
  ++failures;
  if (failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

// A layer; pads are those at the top and left, and at the bottom and right.
struct Link {
  int outputs, inputs, kernel, stride, before, after;
  bool depthwise;
  double density = 1;
  int family = SECATEUR_LIST;

  secateur_spec spec() const {
    return {SECATEUR_CONV,   outputs,          depthwise ? 1 : inputs,       depthwise ? inputs : 1,
            {kernel, kernel}, {stride, stride}, {1, 1}, {before, before, after, after},
            SECATEUR_CLIP,   -0.5f,            1.5f};
  }
  secateur_variant variant() const {
    if (depthwise) return {SECATEUR_DEPTHWISE, 1, 1, 0};
    const int rows = family == SECATEUR_PANELS ? 4 : family == SECATEUR_BLOCKS ? 8 : 1;
    return {family, rows, 4, 0};
  }
};

Link pixels(int outputs, int inputs, double density, int family = SECATEUR_LIST) {
  return {outputs, inputs, 1, 1, 0, 0, false, density, family};
}
Link depthwise(int channels, int kernel, int stride, int before, int after, int each = 1) {
  return {channels * each, channels, kernel, stride, before, after, true};
}

struct Case {
  std::vector<Link> links;
  int64_t dims[3];
  bool residual;
  int threads;
};

std::string describe(const KernelTable &table, const Case &c) {
  std::string text = std::string(table.name) + ", chain";
  for (const Link &l : c.links) {
    text += " " + std::to_string(l.outputs) + "x" + std::to_string(l.inputs) + "/" +
            std::to_string(l.kernel) + "/" + std::to_string(l.stride);
  }
  for (const int64_t size : c.dims) text += ", " + std::to_string(size);
  return text + ", threads " + std::to_string(c.threads);
}

std::vector<float> numbers(std::mt19937 &random, size_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> all(count);
  for (float &value : all) value = normal(random);
  return all;
}

std::vector<float> weights(const Link &link, std::mt19937 &random) {
  const size_t columns = size_t(link.depthwise ? 1 : link.inputs) * link.kernel * link.kernel;
  std::vector<float> w = numbers(random, link.outputs * columns);
  std::uniform_real_distribution<double> unit;
  for (float &value : w) value = unit(random) < link.density ? value : 0.0f;
  return w;
}

struct Images {
  int64_t count, channels, height, width;
  std::vector<double> value, bound;
};

Images applied(const Link &l, const Images &x, const std::vector<float> &w,
               const std::vector<float> &bias, const float *residual) {
  const auto size = [&](int64_t in) { return (in + l.before + l.after - l.kernel) / l.stride + 1; };
  Images y = {x.count, l.outputs, size(x.height), size(x.width), {}, {}};
  const int taps = l.kernel * l.kernel, each = l.depthwise ? l.outputs / l.inputs : 1;
  const int64_t inputs = l.depthwise ? 1 : l.inputs;
  for (int64_t n = 0; n < y.count; ++n) {
    for (int64_t m = 0; m < y.channels; ++m) {
      for (int64_t at = 0; at < y.height * y.width; ++at) {
        double sum = bias[m], sizes = std::fabs(sum), off = 0;
        for (int64_t k = 0; k < inputs * taps; ++k) {
          const double weight = w[m * inputs * taps + k];
          if (weight == 0) continue;
          const int64_t channel = l.depthwise ? m / each : k / taps;
          const int64_t iy = at / y.width * l.stride + k % taps / l.kernel - l.before;
          const int64_t ix = at % y.width * l.stride + k % l.kernel - l.before;
          if (iy < 0 || iy >= x.height || ix < 0 || ix >= x.width) continue;
          const int64_t from = ((n * x.channels + channel) * x.height + iy) * x.width + ix;
          sum += weight * x.value[from], sizes += std::fabs(weight * x.value[from]);
          off += std::fabs(weight) * x.bound[from];
        }
        if (residual) sum += residual[y.value.size()], sizes += std::fabs(residual[y.value.size()]);
        y.value.push_back(std::min(std::max(sum, -0.5), 1.5));
        y.bound.push_back(off + std::ldexp(double(inputs * taps) + 4, -24) * (sizes + off) + 1e-37);
      }
    }
  }
  return y;
}

// How many outputs are outside the bound, and whether anything was written beside them.
struct Result {
  int outside;
  bool guards;
};

Result compare(const KernelTable &table, const Case &c, unsigned seed, float planted = 0) {
  std::mt19937 random(seed);
  std::vector<std::unique_ptr<Layer>> layers;
  std::vector<const Layer *> held;
  const int64_t channels = c.links[0].inputs;
  Images expected = {c.dims[0], channels, c.dims[1], c.dims[2], {}, {}};
  const std::vector<float> x = numbers(random, c.dims[0] * channels * c.dims[1] * c.dims[2]);
  expected.value.assign(x.begin(), x.end());
  expected.bound.assign(x.size(), 0.0);
  const std::vector<float> residual = numbers(random, 1 << 20);
  for (const Link &link : c.links) {
    const bool last = &link == &c.links.back();
    std::vector<float> w = weights(link, random);
    const std::vector<float> bias = numbers(random, link.outputs);
    expected = applied(link, expected, w, bias, last && c.residual ? residual.data() : nullptr);
    if (planted != 0 && &link == &c.links[c.links.size() / 2]) {
      for (float &value : w) value += value != 0 ? planted : 0;
    }
    const secateur_weights stored = {SECATEUR_DENSE, SECATEUR_FLOAT32, w.data(), int64_t(w.size()),
                                     nullptr, 0, bias.data()};
    layers.push_back(std::make_unique<Layer>(link.spec(), stored, link.variant(), table));
    held.push_back(layers.back().get());
  }
  const Chain chain(held);
  int64_t out[3];
  chain.shape(c.dims, out);
  expect(out[0] == c.dims[0] && out[1] == expected.height && out[2] == expected.width,
         describe(table, c) + ": the shape of the output");
  const size_t total = expected.value.size();
  std::vector<float> y(total + 2 * kGuard, std::numeric_limits<float>::quiet_NaN());
  for (size_t i = 0; i < kGuard; ++i) y[i] = y[kGuard + total + i] = kMark;
  // Exactly as large as needed, so that the address sanitizer sees any step outside.
  const auto tight_x = std::make_unique<float[]>(x.size());
  std::copy(x.begin(), x.end(), tight_x.get());
  chain.run(tight_x.get(), c.dims, c.residual ? residual.data() : nullptr, y.data() + kGuard,
            {nullptr, nullptr, c.threads});
  Result result = {0, true};
  for (size_t i = 0; i < total; ++i) {
    result.outside += !(std::fabs(y[kGuard + i] - expected.value[i]) <= expected.bound[i]);
  }
  for (size_t i = 0; i < kGuard; ++i) {
    result.guards &= y[i] == kMark && y[kGuard + total + i] == kMark;
  }
  return result;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const int64_t side : {1, 2, 3, 7, 8, 14, 17, 28}) {
    const int threads = int(side % 5) + 1;
    all.push_back({{pixels(24, 8, 0.3), depthwise(24, 3, 1, 1, 1), pixels(8, 24, 0.3)},
                   {1, side, side}, true, threads});
    all.push_back({{pixels(24, 8, 0.3), depthwise(24, 3, 2, 0, 1), pixels(16, 24, 0.3)},
                   {2, side + 2, side + 1}, false, threads});
    all.push_back({{depthwise(16, 5, 1, 2, 2), pixels(12, 16, 0.4)}, {1, side + 1, side}, true,
                   threads});
    all.push_back({{depthwise(16, 5, 2, 2, 2), pixels(12, 16, 0.4)}, {2, side, side}, true, 2});
    all.push_back({{pixels(16, 4, 0.5), depthwise(16, 3, 2, 1, 1)}, {3, side, side}, true, threads});
  }
  // In more bands than threads: what lies between the layers is larger than the cache.
  all.push_back({{pixels(160, 3, 0.4), depthwise(160, 3, 1, 1, 1), pixels(4, 160, 0.05)},
                 {1, 40, 57}, true, 1});
  all.push_back({{pixels(160, 3, 0.4), depthwise(160, 3, 2, 0, 1), pixels(4, 160, 0.05)},
                 {1, 67, 45}, false, 3});
  all.push_back({{depthwise(3, 3, 1, 1, 1, 2), depthwise(6, 5, 2, 2, 2), pixels(5, 6, 0.7)},
                 {1, 21, 19}, false, 4});
  all.push_back({{pixels(16, 8, 0.6, SECATEUR_PANELS), depthwise(16, 3, 1, 1, 1),
                  pixels(16, 16, 0.6, SECATEUR_BLOCKS)}, {1, 11, 13}, true, 3});
  // More rows of padding than of the image, of which some bands see nothing else.
  all.push_back({{pixels(8, 4, 0.5), depthwise(8, 5, 1, 4, 4), depthwise(8, 5, 2, 4, 4)},
                 {1, 2, 3}, false, 16});
  return all;
}

void refused(const KernelTable &table) {
  const std::vector<float> ones(4096, 1.0f);
  const auto layer = [&](const Link &link) {
    const secateur_spec spec = link.spec();
    const int64_t count = int64_t{spec.outputs} * spec.inputs * link.kernel * link.kernel;
    const secateur_weights stored = {SECATEUR_DENSE, SECATEUR_FLOAT32, ones.data(), count,
                                     nullptr, 0, nullptr};
    return std::make_unique<Layer>(spec, stored, link.variant(), table);
  };
  const auto first = layer(pixels(8, 4, 1)), other = layer(pixels(8, 4, 1));
  const auto wide = layer({8, 8, 3, 1, 1, 1, false}), strided = layer({8, 8, 1, 2, 0, 0, false});
  const std::vector<const Layer *> wrong[] = {
      {}, {first.get()}, {first.get(), other.get()}, {first.get(), wide.get()},
      {first.get(), strided.get()}};
  for (const auto &layers : wrong) {
    try {
      const Chain chain(layers);
      expect(false, "a chain that makes no sense was taken");
    } catch (const Error &error) {
      expect(error.code == SECATEUR_INVALID, "another code");
    }
  }
}

}  // namespace

int main() {
  unsigned seed = 1;
  for (const KernelTable *table : secateur::tables()) {
    const char *forced = std::getenv("SECATEUR_ISA");
    if (forced && std::strcmp(forced, table->name) != 0) continue;
    for (const Case &c : cases()) {
      const Result result = compare(*table, c, ++seed);
      expect(result.outside == 0,
             describe(*table, c) + ": " + std::to_string(result.outside) + " outside the bound");
      expect(result.guards, describe(*table, c) + ": wrote outside");
      expect(compare(*table, c, seed, 1e-2f).outside > 0,
             describe(*table, c) + ": a planted error was not found");
    }
    refused(*table);
  }
  std::printf("%d failed\n", failures);
  return failures ? 1 : 0;
}
