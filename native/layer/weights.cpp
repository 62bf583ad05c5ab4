// Checks a layer's numbers, and decodes its stored weights.
#include <cmath>
#include <cstring>
#include <limits>

#include "spec.h"

namespace secateur {
namespace {

constexpr int64_t kMost = int64_t{1} << 30;  // rows, columns and taps; also the flags of a record

[[noreturn]] void invalid(const std::string &what) { throw Error(SECATEUR_INVALID, what); }
[[noreturn]] void damaged(const std::string &what) { throw Error(SECATEUR_DAMAGED, what); }

void within(const char *name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) {
    invalid(std::string(name) + " is " + std::to_string(value) + "; it must be from " +
            std::to_string(low) + " to " + std::to_string(high));
  }
}

float value_at(const secateur_weights &stored, int64_t i) {
  if (stored.dtype == SECATEUR_FLOAT32) return static_cast<const float *>(stored.values)[i];
  const uint16_t half = static_cast<const uint16_t *>(stored.values)[i];
  if (stored.dtype == SECATEUR_BFLOAT16) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  float size;
  if (exponent == 31) {
    size = mantissa ? std::numeric_limits<float>::quiet_NaN()
                    : std::numeric_limits<float>::infinity();
  } else {
    size = exponent ? std::ldexp(1024.0f + mantissa, exponent - 25)
                    : std::ldexp(static_cast<float>(mantissa), -24);
  }
  return half >> 15 ? -size : size;
}

// Bytes of a number that is to hold every value up to `most`: as formats/layouts.py has it.
int index_width(int64_t most) { return most < 256 ? 1 : most < 65536 ? 2 : 4; }

int64_t index_at(const uint8_t *bytes, int width, int64_t i) {
  if (width == 1) return bytes[i];
  if (width == 2) return bytes[2 * i] | bytes[2 * i + 1] << 8;
  uint32_t value;
  std::memcpy(&value, bytes + 4 * i, sizeof value);
  return static_cast<int32_t>(value);
}

void require_index(const secateur_weights &stored, int64_t bytes) {
  if (stored.index_bytes != bytes || (bytes && !stored.index)) {
    damaged("the index has " + std::to_string(stored.index_bytes) + " bytes; " +
            std::to_string(bytes) + " are needed");
  }
}

void add(Weights &out, int64_t column, float value) {
  if (value == 0.0f) return;
  out.column.push_back(static_cast<int32_t>(column));
  out.value.push_back(value);
}

void from_dense(const secateur_weights &stored, Weights &out) {
  require_index(stored, 0);
  const int64_t total = out.rows * out.columns;
  if (stored.count != total) {
    damaged(std::to_string(stored.count) + " values are stored; a dense weight of this shape has " +
            std::to_string(total));
  }
  for (int64_t row = 0; row < out.rows; ++row) {
    for (int64_t k = 0; k < out.columns; ++k) add(out, k, value_at(stored, row * out.columns + k));
    out.starts.push_back(out.nonzeros());
  }
}

void from_bitmask(const secateur_weights &stored, Weights &out) {
  const int64_t total = out.rows * out.columns;
  require_index(stored, (total + 7) / 8);
  int64_t set = 0;
  for (int64_t i = 0; i < stored.index_bytes; ++i) set += __builtin_popcount(stored.index[i]);
  if (set != stored.count) {
    damaged(std::to_string(set) + " bits are set and " + std::to_string(stored.count) +
            " values are stored");
  }
  if (total % 8 && stored.index[stored.index_bytes - 1] >> (total % 8)) {
    damaged("padding bits of the last byte of the bitmask are set");
  }
  int64_t next = 0;
  for (int64_t row = 0, i = 0; row < out.rows; ++row) {
    for (int64_t k = 0; k < out.columns; ++k, ++i) {
      if (stored.index[i / 8] >> (i % 8) & 1) add(out, k, value_at(stored, next++));
    }
    out.starts.push_back(out.nonzeros());
  }
}

void from_csr(const secateur_weights &stored, Weights &out) {
  const int counts = index_width(out.columns), columns = index_width(out.columns - 1);
  require_index(stored, out.rows * counts + stored.count * columns);
  const uint8_t *const places = stored.index + out.rows * counts;
  int64_t next = 0;
  for (int64_t row = 0; row < out.rows; ++row) {
    const int64_t count = index_at(stored.index, counts, row);
    if (count < 0 || count > stored.count - next) {
      damaged("row " + std::to_string(row) + " claims " + std::to_string(count) +
              " entries; " + std::to_string(stored.count - next) + " are left");
    }
    for (int64_t i = 0, before = -1; i < count; ++i, ++next) {
      const int64_t column = index_at(places, columns, next);
      if (column <= before || column >= out.columns) {
        damaged("row " + std::to_string(row) + " has column " + std::to_string(column) +
                " after " + std::to_string(before) + ", of " + std::to_string(out.columns));
      }
      add(out, column, value_at(stored, next));
      before = column;
    }
    out.starts.push_back(out.nonzeros());
  }
  if (next != stored.count) {
    damaged("the rows have " + std::to_string(next) + " entries and " +
            std::to_string(stored.count) + " values are stored");
  }
}

}  // namespace

void check(const secateur_spec &spec) {
  within("kind", spec.kind, SECATEUR_CONV, SECATEUR_LINEAR);
  within("outputs", spec.outputs, 1, kMost - 1);
  within("inputs", spec.inputs, 1, kMost - 1);
  within("groups", spec.groups, 1, spec.outputs);
  within("activation", spec.activation, SECATEUR_NONE, SECATEUR_HARDSWISH);
  if (spec.outputs % spec.groups) {
    invalid(std::to_string(spec.outputs) + " outputs cannot be split into " +
            std::to_string(spec.groups) + " groups");
  }
  const bool linear = spec.kind == SECATEUR_LINEAR;
  if (linear) within("groups of a linear layer", spec.groups, 1, 1);
  for (int axis = 0; axis < 2; ++axis) {
    within("kernel", spec.kernel[axis], 1, linear ? 1 : 1024);
    within("stride", spec.stride[axis], 1, linear ? 1 : 1024);
    within("dilation", spec.dilation[axis], 1, linear ? 1 : 1024);
  }
  for (const int32_t pad : spec.pads) within("pads", pad, 0, linear ? 0 : 1 << 20);
  const int64_t columns = int64_t{spec.inputs} * spec.kernel[0] * spec.kernel[1];
  within("columns", columns, 1, kMost - 1);
  within("input channels", int64_t{spec.inputs} * spec.groups, 1, kMost - 1);
  if (std::isnan(spec.alpha) || std::isnan(spec.beta)) invalid("a bound of the activation is NaN");
}

Weights decode(const secateur_spec &spec, const secateur_weights &stored) {
  within("layout", stored.layout, SECATEUR_DENSE, SECATEUR_CSR);
  within("dtype", stored.dtype, SECATEUR_FLOAT32, SECATEUR_FLOAT16);
  Weights out;
  out.rows = spec.outputs;
  out.columns = int64_t{spec.inputs} * spec.kernel[0] * spec.kernel[1];
  const int64_t total = out.rows * out.columns;
  if (stored.count < 0 || stored.count > total || (stored.count && !stored.values)) {
    damaged(std::to_string(stored.count) + " values are stored; the weight has " +
            std::to_string(total) + " places");
  }
  out.starts.push_back(0);
  if (stored.layout == SECATEUR_DENSE) {
    from_dense(stored, out);
  } else if (stored.layout == SECATEUR_BITMASK) {
    from_bitmask(stored, out);
  } else {
    from_csr(stored, out);
  }
  out.bias.assign(static_cast<size_t>(out.rows), 0.0f);
  if (stored.bias) out.bias.assign(stored.bias, stored.bias + out.rows);
  return out;
}

}  // namespace secateur
