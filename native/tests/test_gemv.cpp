// Bit mask GEMV against a loop in double precision, on every instruction set that runs here.
//
// The bound: every product is rounded once or not at all, and a sum of n terms in any order, lanes
// included, is off by at most n * eps * sum |w x| (to first order); bias, residual and activation
// add a few roundings of the result.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/table.h"
#include "layer/gemv.h"

using namespace secateur;

namespace {

int failures = 0;

#define EXPECT(condition, ...)                      \
  do {                                              \
    if (!(condition)) {                             \
      ++failures;                                   \
      std::printf("%s:%d: ", __FILE__, __LINE__);   \
      std::printf(__VA_ARGS__);                     \
      std::printf("\n");                            \
    }                                               \
  } while (0)

std::vector<const KernelTable *> tables() {
  std::vector<const KernelTable *> out;
#if defined(__x86_64__)
  out.push_back(&table_baseline);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) out.push_back(&table_avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) {
    out.push_back(&table_avx512);
  }
#elif defined(__aarch64__)
  out.push_back(&table_neon);
#else
  out.push_back(&table_baseline);
#endif
  return out;
}

float to_bfloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits &= 0xffff0000u;
  float rounded;
  std::memcpy(&rounded, &bits, 4);
  return rounded;
}

// density < 0: rows alternate between empty, full and half full.
Weights make(int64_t rows, int64_t columns, double density, bool bfloat, std::mt19937 &random) {
  std::uniform_real_distribution<double> chance(0, 1);
  std::normal_distribution<float> normal;
  Weights w;
  w.rows = rows;
  w.columns = columns;
  w.starts.push_back(0);
  for (int64_t r = 0; r < rows; ++r) {
    const double d = density >= 0 ? density : r % 3 == 0 ? 0 : r % 3 == 1 ? 1 : 0.5;
    for (int64_t c = 0; c < columns; ++c) {
      if (chance(random) >= d) continue;
      const float value = normal(random), rounded = to_bfloat(value);
      w.column.push_back(static_cast<int32_t>(c));
      w.value.push_back(bfloat ? rounded : value);
    }
    w.starts.push_back(w.nonzeros());
    w.bias.push_back(normal(random));
  }
  return w;
}

double exact(const secateur_spec &spec, double y) {
  switch (spec.activation) {
    case SECATEUR_RELU:
      return y > 0 ? y : 0;
    case SECATEUR_CLIP:
      return std::fmin(std::fmax(y, spec.alpha), spec.beta);
    case SECATEUR_GELU:
      return 0.5 * y * (1 + std::erf(y / std::sqrt(2.0)));
    case SECATEUR_SILU:
      return y / (1 + std::exp(-y));
    case SECATEUR_HARDSWISH:
      return y * std::fmin(std::fmax(y / 6 + 0.5, 0), 1);
    default:
      return y;
  }
}

// A run with the answer, the outcome and guards on both sides.
struct Case {
  secateur_spec spec{};
  Weights weights;
  int64_t tokens = 1;
  std::vector<float> x, residual;

  static constexpr float kGuard = 12345.0f;
  static constexpr size_t kMargin = 32;

  std::vector<float> run(const Gemv &layer, int threads) const {
    const size_t count = static_cast<size_t>(tokens * weights.rows);
    std::vector<float> y(count + 2 * kMargin, kGuard);
    std::fill(y.begin() + kMargin, y.end() - kMargin, std::numeric_limits<float>::quiet_NaN());
    // Exactly as long as it may be read: the sanitizer sees a step too far.
    std::vector<float> input(x.begin(), x.end());
    Parallel parallel;
    parallel.threads = threads;
    if (threads > 1) {
      parallel.run = [](void *, void (*task)(void *, size_t), size_t tasks, void *user) {
        while (tasks--) task(user, tasks);  // backwards: the order must not matter
      };
    }
    layer.run(input.data(), tokens, residual.empty() ? nullptr : residual.data(),
              y.data() + kMargin, parallel);
    for (size_t i = 0; i < kMargin; ++i) {
      EXPECT(y[i] == kGuard && y[y.size() - 1 - i] == kGuard, "a guard was written");
    }
    return std::vector<float>(y.begin() + kMargin, y.end() - kMargin);
  }

  // How many outputs are further off than rounding explains.
  int wrong(const std::vector<float> &y) const {
    const double eps = std::numeric_limits<float>::epsilon();
    int bad = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t r = 0; r < weights.rows; ++r) {
        double sum = weights.bias[r], size = std::fabs(sum);
        for (int64_t i = weights.starts[r]; i < weights.starts[r + 1]; ++i) {
          const double term =
              double(weights.value[i]) * x[t * weights.columns + weights.column[i]];
          sum += term;
          size += std::fabs(term);
        }
        const int64_t at = t * weights.rows + r;
        if (!residual.empty()) {
          sum += residual[at];
          size += std::fabs(residual[at]);
        }
        const double n = double(weights.starts[r + 1] - weights.starts[r]) + 8;
        // No activation is steeper than 1.2; each adds at most a few roundings of its argument.
        const double bound = 1.2 * n * eps * size + 8 * eps * std::fabs(sum) + 1e-37;
        const double want = exact(spec, sum);
        if (!(std::fabs(y[at] - want) <= bound)) ++bad;
      }
    }
    return bad;
  }
};

Case make_case(int64_t rows, int64_t columns, int64_t tokens, double density, bool bfloat,
               int activation, bool residual, std::mt19937 &random) {
  std::normal_distribution<float> normal;
  Case c;
  c.spec.kind = SECATEUR_LINEAR;
  c.spec.outputs = static_cast<int32_t>(rows);
  c.spec.inputs = static_cast<int32_t>(columns);
  c.spec.groups = 1;
  c.spec.activation = activation;
  c.spec.alpha = -0.5f;
  c.spec.beta = 0.75f;
  c.weights = make(rows, columns, density, bfloat, random);
  c.tokens = tokens;
  c.x.resize(tokens * columns);
  for (float &v : c.x) v = normal(random);
  if (residual) {
    c.residual.resize(tokens * rows);
    for (float &v : c.residual) v = normal(random);
  }
  return c;
}

Gemv layer_of(const Case &c, bool bfloat, const KernelTable &table) {
  return Gemv(c.spec, c.weights, bfloat ? SECATEUR_BFLOAT16 : SECATEUR_FLOAT32, table.gemv_f32,
              table.gemv_bf16);
}

void sizes(const KernelTable &table) {
  std::mt19937 random(1);
  int activation = 0;
  for (int64_t columns : {1, 2, 15, 16, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 1000}) {
    for (int64_t rows : {1, 2, 3, 4, 5, 9, 33}) {
      for (int64_t tokens : {1, 2, 3, 4, 5, 7, 8, 9, 17}) {
        for (double density : {-1.0, 0.0, 0.1, 0.5, 1.0}) {
          for (int kind = 0; kind < 3; ++kind) {
            const bool bfloat = kind > 0;
            activation = (activation + 1) % 6;
            const Case c = make_case(rows, columns, tokens, density, bfloat, activation,
                                     random() % 2, random);
            Gemv layer = layer_of(c, bfloat, table);
            layer.plain(kind == 2);
            const int bad = c.wrong(c.run(layer, 1 + random() % 3));
            EXPECT(bad == 0, "%s: %d wrong: rows %d columns %d tokens %d density %g kind %d",
                   table.name, bad, int(rows), int(columns), int(tokens), density, kind);
          }
        }
      }
    }
  }
}

// Large enough to be cut into tasks; any number of tasks gives the same bits.
void tasks(const KernelTable &table) {
  std::mt19937 random(2);
  for (bool bfloat : {false, true}) {
    const Case c = make_case(401, 1100, 2, -1, bfloat, SECATEUR_NONE, true, random);
    const Gemv layer = layer_of(c, bfloat, table);
    const std::vector<float> one = c.run(layer, 1);
    EXPECT(c.wrong(one) == 0, "%s: wrong", table.name);
    for (int threads : {2, 3, 16, 1000}) {
      const std::vector<float> many = c.run(layer, threads);
      EXPECT(c.wrong(many) == 0, "%s: wrong on %d threads", table.name, threads);
    }
  }
}

// The comparison must see one wrong weight, one wrong column and one lost value.
void planted(const KernelTable &table) {
  std::mt19937 random(3);
  const Case c = make_case(40, 130, 3, 0.3, true, SECATEUR_NONE, false, random);
  Case changed = c;
  changed.weights.value[77] *= 1.015625f;
  EXPECT(c.wrong(c.run(layer_of(changed, false, table), 1)) >= 1, "a wrong weight passes");
  changed = c;
  changed.weights.value[78] = 0;
  EXPECT(c.wrong(c.run(layer_of(changed, true, table), 1)) >= 1, "a lost weight passes");
  changed = c;
  changed.x[5] = -changed.x[5];
  EXPECT(c.wrong(changed.run(layer_of(c, true, table), 1)) >= 1, "a wrong input passes");
  changed = c;
  changed.weights.bias[7] += 0.01f;
  EXPECT(c.wrong(c.run(layer_of(changed, true, table), 1)) == 3, "a wrong bias passes");
}

void special(const KernelTable &table) {
  std::mt19937 random(4);
  const float inf = std::numeric_limits<float>::infinity();
  for (bool bfloat : {false, true}) {
    Case c = make_case(7, 130, 1, 1, bfloat, SECATEUR_NONE, false, random);
    c.x[129] = inf;
    std::vector<float> y = c.run(layer_of(c, bfloat, table), 1);
    for (int r = 0; r < 7; ++r) {
      const float w = c.weights.value[c.weights.starts[r] + 129];
      EXPECT(y[r] == (w > 0 ? inf : -inf), "%s: infinity is lost", table.name);
    }
    c.x[129] = std::nanf("");
    for (int activation = 0; activation < 6; ++activation) {
      c.spec.activation = activation;
      y = c.run(layer_of(c, bfloat, table), 1);
      for (float v : y) EXPECT(v != v, "%s: NaN is lost by activation %d", table.name, activation);
    }
    // Denormal inputs and weights.
    c = make_case(5, 70, 2, 0.5, false, SECATEUR_NONE, false, random);
    for (float &v : c.x) v *= 1e-20f;
    for (float &v : c.weights.value) v *= 1e-20f;
    for (float &v : c.weights.bias) v = 0;
    EXPECT(c.wrong(c.run(layer_of(c, false, table), 1)) == 0, "%s: denormals", table.name);
  }
}

void refused(const KernelTable &table) {
  std::mt19937 random(5);
  Case c = make_case(3, 10, 1, 1, true, SECATEUR_NONE, false, random);
  c.weights.value[13] = 0.1f;
  try {
    layer_of(c, true, table);
    EXPECT(false, "0.1 is held as bfloat16");
  } catch (const Error &error) {
    EXPECT(error.code == SECATEUR_INVALID, "code %d", error.code);
    EXPECT(std::string(error.what()).find("row 1, column 3") != std::string::npos, "%s",
           error.what());
  }
}

void accounted(const KernelTable &table) {
  std::mt19937 random(6);
  const Case c = make_case(64, 640, 1, 0.5, true, SECATEUR_NONE, false, random);
  const int64_t bytes = layer_of(c, true, table).bytes();
  const int64_t least = 64 * 640 / 8 + 2 * c.weights.nonzeros();
  EXPECT(bytes >= least && bytes < least + 64 * 12 + 200, "%d bytes", int(bytes));
}

}  // namespace

int main() {
  for (const KernelTable *table : tables()) {
    const int before = failures;
    sizes(*table);
    tasks(*table);
    planted(*table);
    special(*table);
    refused(*table);
    accounted(*table);
    std::printf("%s: %s\n", table->name, failures == before ? "ok" : "FAILED");
  }
  return failures ? 1 : 0;
}
