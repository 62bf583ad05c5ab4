// Every kernel of every instruction set that runs here against a loop in double precision.
//
// The bound: a sum of n products in float32, in any order and with or without fused multiply-adds,
// is off by at most (n + 2) * 2^-24 * sum |w x| (Higham, Accuracy and Stability, 3.1), bias and
// residual being two more terms; an activation adds its own error and passes this one on with a
// slope of at most 1.13 (GELU's). In half precision the same holds with 2^-11 for the products, whose
// factors are rounded, too; and a term may lose 2^-24, the smallest step of a float16.
#include <cinttypes>
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
#include "layer/layer.h"
#include "secateur.h"

namespace {

using secateur::Layer;

struct Case {
  secateur_spec spec;
  int64_t dims[3];
  double density;
  bool bias, residual;
  int pattern;  // weights: 0 anywhere, 1 some rows empty and some dense, 2 blocks of 4 rows
  bool norm = false;
};

double activated(double v, const secateur_spec &spec) {
  switch (spec.activation) {
    case SECATEUR_RELU: return v < 0 ? 0 : v;
    case SECATEUR_CLIP: return std::min<double>(std::max<double>(v, spec.alpha), spec.beta);
    case SECATEUR_GELU: return 0.5 * v * (1 + std::erf(v * std::sqrt(0.5)));
    case SECATEUR_SILU: return v / (1 + std::exp(-v));
    case SECATEUR_HARDSWISH: return v * std::min(1.0, std::max(0.0, v / 6 + 0.5));
    default: return v;
  }
}

struct Expected {
  std::vector<double> value, bound;
};

// What becomes of normalised tokens: with values off by at most e, mean and deviation are off by e each,
// and a sum of n values by n * eps of their size.
void normalise(Expected &expected, int64_t features, const std::vector<float> &scale,
               const std::vector<float> &shift, float epsilon) {
  const double eps = std::ldexp(1.0, -24);
  for (size_t first = 0; first < expected.value.size(); first += features) {
    double *const y = &expected.value[first], *const bound = &expected.bound[first];
    double mean = 0, squares = 0, off = 0, size = 0;
    for (int64_t i = 0; i < features; ++i) {
      mean += y[i] / features;
      off = std::max(off, bound[i]), size = std::max(size, std::fabs(y[i]));
    }
    for (int64_t i = 0; i < features; ++i) squares += (y[i] - mean) * (y[i] - mean) / features;
    const double deviation = std::sqrt(squares + epsilon);
    for (int64_t i = 0; i < features; ++i) {
      const double z = (y[i] - mean) / deviation;
      y[i] = z * scale[i] + shift[i];
      bound[i] = 1.2 * std::fabs(scale[i]) * (1 + std::fabs(z)) / deviation *
                     (2 * off + (features + 8) * eps * size) +
                 8 * eps * (std::fabs(z * scale[i]) + std::fabs(shift[i]));
    }
  }
}

// The definition: y[m] = act(bias[m] + residual + sum of w * x), tap by tap.
Expected reference(const Case &c, bool half, const std::vector<float> &w, const std::vector<float> &bias,
                   const std::vector<float> &x, const std::vector<float> &residual,
                   const int64_t out[3]) {
  const secateur_spec &s = c.spec;
  const bool linear = s.kind == SECATEUR_LINEAR;
  const int64_t channels = int64_t{s.inputs} * s.groups, of_group = s.outputs / s.groups;
  const int64_t h = c.dims[1], wd = c.dims[2];
  const int64_t taps = int64_t{s.kernel[0]} * s.kernel[1];
  Expected found;
  const auto put = [&](int64_t m, int64_t at, auto &&x_at) {
    double sum = c.bias ? bias[m] : 0, size = std::fabs(sum), products = 0, steps = 0;
    for (int64_t k = 0; k < s.inputs * taps; ++k) {
      const double weight = w[m * s.inputs * taps + k];
      if (weight == 0) continue;
      const double x_here = x_at(k), product = weight * x_here;
      sum += product;
      size += std::fabs(product);
      products += std::fabs(product);
      steps += std::ldexp(std::fabs(weight) + std::fabs(x_here) + 1, -24);
    }
    if (c.residual) {
      sum += residual[at];
      size += std::fabs(residual[at]);
    }
    const double y = activated(sum, s);
    const double eps = std::ldexp(1.0, -24);
    found.value[at] = y;
    const double terms = double(s.inputs * taps) + 4;
    found.bound[at] = 1.13 * terms * (eps * size + (half ? std::ldexp(products, -11) + steps : 0)) +
                      (s.activation >= SECATEUR_GELU ? 8 * eps * std::fabs(sum) : 0) + 1e-37;
  };
  if (linear) {
    const int64_t total = c.dims[0] * s.outputs;
    found.value.resize(total), found.bound.resize(total);
    for (int64_t t = 0; t < c.dims[0]; ++t) {
      for (int64_t m = 0; m < s.outputs; ++m) {
        put(m, t * s.outputs + m, [&](int64_t k) { return double(x[t * s.inputs + k]); });
      }
    }
    return found;
  }
  const int64_t total = out[0] * s.outputs * out[1] * out[2];
  found.value.resize(total), found.bound.resize(total);
  for (int64_t n = 0; n < out[0]; ++n) {
    for (int64_t m = 0; m < s.outputs; ++m) {
      for (int64_t oy = 0; oy < out[1]; ++oy) {
        for (int64_t ox = 0; ox < out[2]; ++ox) {
          put(m, ((n * s.outputs + m) * out[1] + oy) * out[2] + ox, [&](int64_t k) {
            const int64_t channel = m / of_group * s.inputs + k / taps;
            const int64_t iy = oy * s.stride[0] + k % taps / s.kernel[1] * s.dilation[0] - s.pads[0];
            const int64_t ix = ox * s.stride[1] + k % s.kernel[1] * s.dilation[1] - s.pads[1];
            if (iy < 0 || iy >= h || ix < 0 || ix >= wd) return 0.0;
            return double(x[((n * channels + channel) * h + iy) * wd + ix]);
          });
        }
      }
    }
  }
  return found;
}

// How many entries are outside the bound; NaN counts as outside.
int64_t outside(const Expected &expected, const float *y) {
  int64_t count = 0;
  for (size_t i = 0; i < expected.value.size(); ++i) {
    count += !(std::fabs(y[i] - expected.value[i]) <= expected.bound[i]);
  }
  return count;
}

std::string describe(const Case &c, const secateur_variant &v, const char *isa) {
  char text[512];
  const secateur_spec &s = c.spec;
  std::snprintf(text, sizeof text,
                "%s kind %d out %d in %d groups %d kernel %dx%d stride %d,%d dilation %d,%d pads "
                "%d,%d,%d,%d act %d dims %" PRId64 ",%" PRId64 ",%" PRId64
                " density %.2f bias %d residual %d pattern %d | family %d rows %d vectors %d "
                "columns %d",
                isa, s.kind, s.outputs, s.inputs, s.groups, s.kernel[0], s.kernel[1], s.stride[0],
                s.stride[1], s.dilation[0], s.dilation[1], s.pads[0], s.pads[1], s.pads[2],
                s.pads[3], s.activation, c.dims[0], c.dims[1], c.dims[2], c.density, c.bias,
                c.residual, c.pattern, v.family, v.rows, v.vectors, v.columns);
  return text;
}

std::vector<float> numbers(std::mt19937 &random, size_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> out(count);
  for (float &v : out) v = normal(random);
  return out;
}

std::vector<float> weights_of(const Case &c, std::mt19937 &random) {
  const int64_t columns = int64_t{c.spec.inputs} * c.spec.kernel[0] * c.spec.kernel[1];
  std::vector<float> w = numbers(random, c.spec.outputs * columns);
  std::uniform_real_distribution<double> unit;
  for (int64_t m = 0; m < c.spec.outputs; ++m) {
    for (int64_t k = 0; k < columns; ++k) {
      bool keep = unit(random) < c.density;
      if (c.pattern == 1 && m % 5 == 0) keep = false;
      if (c.pattern == 1 && m % 5 == 1) keep = true;
      if (c.pattern == 2) keep = (m / 4 * 7 + k * 13) % 100 < 100 * c.density;
      if (!keep) w[m * columns + k] = m % 2 ? 0.0f : -0.0f;
    }
  }
  return w;
}

// A buffer that ends where its page of guard words begins.
constexpr size_t kGuard = 64;
constexpr float kMark = 12345.678f;

struct Result {
  int64_t outside;
  bool guards;
};

secateur_weights stored_of(const std::vector<float> &w, const std::vector<float> &bias, bool has) {
  return {SECATEUR_DENSE, SECATEUR_FLOAT32, w.data(), int64_t(w.size()), nullptr, 0,
          has ? bias.data() : nullptr};
}

Result compare(const Case &c, const secateur_variant &variant, const secateur::KernelTable &table,
               unsigned seed, float planted = 0) {
  std::mt19937 random(seed);
  const secateur_spec &s = c.spec;
  const std::vector<float> w = weights_of(c, random);
  const std::vector<float> bias = numbers(random, s.outputs);
  std::vector<float> wrong = w;
  if (planted != 0) {
    size_t i = wrong.size() / 2;
    while (wrong[i % wrong.size()] == 0) ++i;
    wrong[i % wrong.size()] += planted;
  }
  Layer layer(s, stored_of(wrong, bias, c.bias), variant, table);
  const std::vector<float> scale = numbers(random, s.outputs), shift = numbers(random, s.outputs);
  if (c.norm) layer.normalise(scale.data(), c.pattern ? shift.data() : nullptr, 0.01f);
  int64_t out[3];
  layer.shape(c.dims, out);
  const bool linear = s.kind == SECATEUR_LINEAR;
  const size_t in = linear ? c.dims[0] * s.inputs
                           : c.dims[0] * int64_t{s.inputs} * s.groups * c.dims[1] * c.dims[2];
  const size_t total =
      linear ? c.dims[0] * s.outputs : out[0] * int64_t{s.outputs} * out[1] * out[2];
  const std::vector<float> x = numbers(random, in), residual = numbers(random, total);
  std::vector<float> y(total + 2 * kGuard, std::numeric_limits<float>::quiet_NaN());
  for (size_t i = 0; i < kGuard; ++i) y[i] = y[kGuard + total + i] = kMark;
  // Exactly as large as needed, so that the address sanitizer sees any step outside.
  std::vector<float> tight(total, std::numeric_limits<float>::quiet_NaN());
  const float *r = c.residual ? residual.data() : nullptr;
  layer.run(x.data(), c.dims, r, y.data() + kGuard, {nullptr, nullptr, 2});
  layer.run(x.data(), c.dims, r, tight.data(), {nullptr, nullptr, 1});
  Expected expected = reference(c, variant.family == SECATEUR_HALF, w, bias, x, residual, out);
  if (c.norm) {
    const std::vector<float> none(s.outputs);
    normalise(expected, s.outputs, scale, c.pattern ? shift : none, 0.01f);
  }
  Result result = {outside(expected, y.data() + kGuard) + outside(expected, tight.data()), true};
  for (size_t i = 0; i < kGuard; ++i) {
    result.guards &= y[i] == kMark && y[kGuard + total + i] == kMark;
  }
  return result;
}

secateur_spec conv(int out, int in, int groups, int k, int stride, int dilation, int pad, int act) {
  return {SECATEUR_CONV,        out, in, groups, {k, k}, {stride, stride}, {dilation, dilation},
          {pad, pad, pad, pad}, act, -0.5f, 1.5f};
}

secateur_spec linear(int out, int in, int act) {
  return {SECATEUR_LINEAR, out, in, 1, {1, 1}, {1, 1}, {1, 1}, {0, 0, 0, 0}, act, -0.5f, 1.5f};
}

std::vector<Case> cases() {
  std::vector<Case> all;
  // 1 x 1: images around the width of a vector and of a tile.
  for (const int64_t side : {1, 2, 3, 4, 5, 7, 8, 14, 15, 16, 17, 28}) {
    all.push_back({conv(16, 24, 1, 1, 1, 1, 0, side % 6), {1, side, side}, 0.3, true, side % 2 == 0,
                   int(side % 3)});
  }
  all.push_back({conv(16, 1, 1, 1, 1, 1, 0, 0), {2, 9, 5}, 0.9, false, false, 0});
  all.push_back({conv(48, 200, 1, 1, 1, 1, 0, 1), {1, 13, 13}, 0.05, true, true, 1});
  all.push_back({conv(16, 16, 1, 1, 1, 1, 0, 0), {1, 3, 3}, 0.0, true, false, 0});
  all.push_back({conv(16, 16, 1, 1, 1, 1, 0, 0), {1, 3, 3}, 1.0, true, false, 0});
  // k x k: strides, dilation, padding, groups, wide rows, images smaller than the kernel.
  for (const int64_t side : {1, 2, 5, 7, 14, 16, 28, 30, 57}) {
    all.push_back({conv(16, 8, 1, 3, 1, 1, 1, 1), {1, side, side}, 0.3, true, true, 0});
    all.push_back({conv(16, 8, 1, 3, 2, 1, 1, 0), {2, side, side + 1}, 0.3, true, false, 1});
  }
  all.push_back({conv(16, 8, 1, 3, 1, 1, 1, 0), {1, 3, 300}, 0.3, false, true, 0});
  all.push_back({conv(16, 8, 1, 3, 2, 1, 1, 0), {1, 5, 611}, 0.3, false, true, 0});
  all.push_back({conv(16, 8, 1, 5, 1, 2, 4, 2), {1, 11, 9}, 0.2, true, true, 2});
  // Taps far apart; in the last three no list could say where, so they read copies of the image.
  all.push_back({conv(16, 4, 1, 3, 1, 60, 60, 1), {1, 130, 140}, 0.4, true, true, 0});
  all.push_back({conv(16, 4, 1, 3, 1, 700, 700, 1), {1, 20, 23}, 0.4, true, true, 0});
  all.push_back({conv(16, 4, 1, 3, 2, 1001, 1001, 0), {1, 13, 12}, 0.4, false, false, 1});
  all.push_back({conv(16, 4, 1, 5, 1, 700, 1400, 1), {1, 20, 23}, 0.4, true, true, 0});  // 25 copies
  all.push_back({conv(16, 8, 1, 3, 3, 2, 2, 0), {1, 17, 23}, 0.4, true, false, 0});
  all.push_back({conv(16, 4, 1, 1, 2, 1, 0, 1), {1, 14, 15}, 0.4, true, true, 0});
  all.push_back({conv(16, 4, 1, 2, 1, 1, 0, 0), {1, 2, 2}, 0.5, true, false, 0});
  all.push_back({conv(32, 4, 2, 3, 1, 1, 1, 0), {1, 9, 9}, 0.4, true, true, 0});
  all.push_back({conv(48, 1, 48, 3, 1, 1, 1, 2), {2, 14, 14}, 1.0, true, false, 0});
  all.push_back({conv(48, 1, 48, 3, 2, 1, 1, 2), {1, 15, 14}, 1.0, true, false, 0});
  for (const int64_t side : {1, 3, 4, 7, 8, 14, 17, 28, 33}) {
    for (const int stride : {1, 2}) {
      const bool residual = side % 2 == 0;
      all.push_back({conv(32, 1, 16, 3, stride, 1, 1, int(side % 6)), {1, side, side + 2}, 1.0,
                     true, residual, 0});
      all.push_back({conv(16, 1, 16, 5, stride, 1, 2, 2), {2, side, side}, 0.7, true, residual, 0});
    }
  }
  all.push_back({conv(4, 1, 4, 3, 1, 1, 0, 0), {1, 5, 5}, 1.0, false, false, 0});
  all.push_back({conv(1, 1, 1, 3, 2, 1, 1, 0), {1, 9, 40}, 1.0, false, true, 0});
  for (const int stride : {1, 2}) {  // far more columns of the output than of the input
    Case wide = {conv(4, 1, 4, 3, stride, 1, 1, 0), {1, 2, 8}, 1.0, true, false, 0};
    wide.spec.pads[2] = 70, wide.spec.pads[3] = 150;
    all.push_back(wide);
  }
  Case uneven = {conv(16, 6, 1, 3, 1, 1, 0, 0), {1, 6, 9}, 0.4, true, false, 0};
  uneven.spec.kernel[1] = 5, uneven.spec.stride[0] = 2, uneven.spec.pads[0] = 1;
  uneven.spec.pads[3] = 3, uneven.spec.dilation[0] = 2;
  all.push_back(uneven);
  for (const int64_t tokens : {1, 3, 8, 9, 15, 16, 17, 33, 128, 250}) {
    all.push_back({linear(16 * int(tokens % 4 + 1), 37, tokens % 6), {tokens, 1, 1}, 0.3, true,
                   tokens % 2 == 0, int(tokens % 3)});
  }
  for (const int64_t tokens : {1, 2, 17, 64, 250}) {  // the last ones in parts, and in many tiles
    for (const int outputs : {16, 48, 368}) {
      all.push_back({linear(outputs, 37, tokens % 6), {tokens, 1, 1}, 0.3, true, tokens % 2 == 0,
                     int(tokens % 3), true});
    }
  }
  all.push_back({linear(16, 1, 3), {5, 1, 1}, 1.0, false, false, 0});
  all.push_back({linear(32, 500, 4), {20, 1, 1}, 0.05, true, true, 1});
  all.push_back({linear(16, 1100, 0), {250, 1, 1}, 0.02, true, false, 0});  // beyond one panel
  return all;
}

std::vector<secateur_variant> variants(const secateur_spec &spec, bool has_half) {
  std::vector<secateur_variant> all;
  for (int v = 1; v <= secateur::kMostVectors; ++v) {
    const int columns = v % 3 == 0 ? 0 : v % 3 == 1 ? 5 : 1000;
    all.push_back({SECATEUR_LIST, 1, v, columns});
    if (has_half && v % 2 == 0) all.push_back({SECATEUR_HALF, 1, v, columns});
  }
  const int of_group = spec.outputs / spec.groups;
  for (const int v : {1, 2, 3, 4, 5, 6, 7, 11, 14}) {
    if (of_group % 4 == 0) all.push_back({SECATEUR_PANELS, 4, v, v % 2 ? 0 : 7});
    for (const int rows : {4, 8, 16}) {
      if (of_group % rows == 0) all.push_back({SECATEUR_BLOCKS, rows, v, v % 2 ? 3 : 0});
    }
  }
  if (secateur::Depthwise::suits(spec)) all.push_back({SECATEUR_DEPTHWISE, 1, 1, 0});
  if (spec.kind == SECATEUR_LINEAR) all.push_back({SECATEUR_GEMV, 1, 1, 0});
  return all;
}

int failures = 0;

void expect(bool good, const std::string &what) {
  if (good) return;
  ++failures;
  if (failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

void special_values(const secateur::KernelTable &table) {
  // 0 * Inf is skipped, so an infinity reaches only the rows that use its channel; NaN and
  // denormals pass; a weight of NaN is kept.
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float tiny = std::numeric_limits<float>::denorm_min();
  const std::vector<float> w = {1, 0, 0, 0, 1, 0, 0, 0, 1, 0, nan, 0};
  const std::vector<float> bias(4);
  const Layer layer(conv(4, 3, 1, 1, 1, 1, 0, 0), stored_of(w, bias, false),
                    {SECATEUR_LIST, 1, 2, 0}, table);
  const std::vector<float> x = {inf, 1, tiny, -0.0f};
  std::vector<float> in;
  for (int c = 0; c < 3; ++c) in.insert(in.end(), {x[c], x[c]});
  std::vector<float> y(8);
  const int64_t dims[3] = {1, 1, 2};
  layer.run(in.data(), dims, nullptr, y.data(), {});
  expect(y[0] == inf && y[2] == 1 && y[4] == tiny && std::isnan(y[6]),
         std::string(table.name) + ": infinity, denormals and NaN");
}

}  // namespace

int main() {
  unsigned seed = 1;
  int64_t runs = 0;
  for (const secateur::KernelTable *table : secateur::tables()) {
    const char *forced = std::getenv("SECATEUR_ISA");
    if (forced && std::strcmp(forced, table->name) != 0) continue;
    for (const Case &c : cases()) {
      for (const secateur_variant &variant : variants(c.spec, table->half_list)) {
        const Result result = compare(c, variant, *table, ++seed);
        ++runs;
        expect(result.outside == 0, describe(c, variant, table->name) + ": " +
                                        std::to_string(result.outside) + " outside the bound");
        expect(result.guards, describe(c, variant, table->name) + ": wrote outside");
      }
    }
    // Every family must be caught with one weight slightly wrong.
    const Case image = {conv(16, 8, 1, 3, 1, 1, 1, 0), {1, 7, 7}, 0.5, true, false, 0};
    const Case channels = {conv(8, 1, 8, 3, 1, 1, 1, 0), {1, 7, 7}, 1.0, true, false, 0};
    const Case tokens = {linear(16, 40, 0), {16, 1, 1}, 0.5, true, false, 0};
    for (const secateur_variant &variant :
         {secateur_variant{SECATEUR_LIST, 1, 4, 0}, secateur_variant{SECATEUR_PANELS, 4, 4, 0},
          secateur_variant{SECATEUR_BLOCKS, 8, 3, 0}, secateur_variant{SECATEUR_GEMV, 1, 1, 0},
          secateur_variant{SECATEUR_HALF, 1, 4, 0},
          secateur_variant{SECATEUR_DEPTHWISE, 1, 1, 0}}) {
      const bool half = variant.family == SECATEUR_HALF;
      if (half && !table->half_list) continue;
      const Case &c = variant.family == SECATEUR_GEMV        ? tokens
                      : variant.family == SECATEUR_DEPTHWISE ? channels
                                                             : image;
      expect(compare(c, variant, *table, 7, half ? 3.0f : 1e-3f).outside > 0,
             describe(c, variant, table->name) + ": a planted error was not found");
    }
    Case normed = tokens;
    normed.norm = true;
    expect(compare(normed, {SECATEUR_LIST, 1, 4, 0}, *table, 7, 1e-3f).outside > 0,
           std::string(table->name) + ": a planted error was not found behind normalisation");
    special_values(*table);
  }
  std::printf("%" PRId64 " comparisons, %d failed\n", runs, failures);
  return failures ? 1 : 0;
}
