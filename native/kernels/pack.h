// Activations into panels, and finished sums of tokens back into rows.
#pragma once

#include "finish.h"

namespace secateur {
namespace SECATEUR_ISA {

static inline void zero_row(float *dst, int count) {
  for (int j = 0; j < count; j += kLanes) store(dst + j, Vec{});
}

static void pack_plane(const float *x, int64_t plane, int32_t channels, int32_t valid,
                       int32_t vectors, float *panel) {
  const int whole = valid / kLanes, rest = valid % kLanes;
  for (int c = 0; c < channels; ++c, x += plane, panel += vectors * kLanes) {
    int j = 0;
    for (; j < whole; ++j) store(panel + j * kLanes, load(x + j * kLanes));
    if (rest) store(panel + j++ * kLanes, load_some(x + whole * kLanes, rest));
    for (; j < vectors; ++j) store(panel + j * kLanes, Vec{});
  }
}

// Which of the places at, at + stride, at + 2 * stride ... lie in [0, size): [begin, stop) of count.
struct Span {
  int begin, stop;
};
static inline Span inside(int64_t at, int64_t stride, int64_t size, int count) {
  const auto steps = [&](int64_t floats) {  // a division takes as long as copying a row
    return floats <= 0 ? 0 : stride == 1 ? floats : (floats + stride - 1) / stride;
  };
  const int64_t begin = steps(-at), stop = steps(size - at);
  return {static_cast<int>(begin < count ? begin : count),
          static_cast<int>(stop < count ? stop : count)};
}

// The part of a phase that lies inside the image, the same in all channels.
struct Cut {
  Span rows, columns;
  int64_t from;  // where its first row and column would be, in the image
};
static inline Cut cut_of(const Window &w, int phase) {
  const int64_t top = w.row0 * w.stride_y + w.phases[2 * phase] - w.pad_y;
  const int64_t left = w.col0 * w.stride_x + w.phases[2 * phase + 1] - w.pad_x;
  return {inside(top, w.stride_y, w.height, w.rows), inside(left, w.stride_x, w.width, w.cols),
          top * w.width + left};
}

// The rows inside the image. Vectors may run over the end of a row, with zeros: as columns go down and
// rows up, what they spill is written afterwards.
static inline void pack_rows(const Window &w, const float *src, Span rows, Span columns,
                             float *dst) {
  const int64_t down = w.stride_y * w.width;
  const auto each_row = [&](int column, auto row) __attribute__((always_inline)) {
    const float *from = src + rows.begin * down + column * w.stride_x;
    float *to = dst + rows.begin * w.cols + column;
    for (int r = rows.begin; r < rows.stop; ++r, from += down, to += w.cols) row(from, to);
  };
  const int last = (w.cols - 1) / kLanes * kLanes;
  for (int j = last; j >= 0; j -= kLanes) {
    const int begin = columns.begin - j, stop = columns.stop - j;
    if (w.stride_x == 1) {
      const Between lanes(begin, stop);
      each_row(j, [&](const float *from, float *to) { store(to, lanes.load(from)); });
    } else if (w.stride_x == 2) {
      const Between low(2 * begin, 2 * stop - 1);
      const Between high(2 * begin - kLanes, 2 * stop - 1 - kLanes);
      each_row(j, [&](const float *from, float *to) {
        store(to, evens(low.load(from), high.load(from + kLanes)));
      });
    } else {
      each_row(j, [&](const float *from, float *to) {
        Vec v = {};
        for (int i = 0; i < kLanes; ++i) {
          if (begin <= i && i < stop) v[i] = from[i * w.stride_x];
        }
        store(to, v);
      });
    }
  }
}

static void pack_window(const Window &w, float *panel) {
  constexpr int kKept = 16;  // more phases have only kernels of 5 x 5 and more, far apart
  Cut cuts[kKept];
  for (int i = 0; i < w.phase_count && i < kKept; ++i) cuts[i] = cut_of(w, i);
  const int64_t image = w.height * w.width;
  const float *x = w.x + w.channel * image;
  for (int c = 0; c < w.channels; ++c, x += image) {
    float *dst = panel + c * w.channel_floats;
    for (int i = 0; i < w.phase_count; ++i, dst += w.rows * w.cols) {
      const Cut cut = i < kKept ? cuts[i] : cut_of(w, i);
      zero_row(dst, cut.rows.begin * w.cols);
      zero_row(dst + cut.rows.stop * w.cols, (w.rows - cut.rows.stop) * w.cols);
      pack_rows(w, x + cut.from, cut.rows, cut.columns, dst);
    }
  }
}

static void pack_tokens(const Tokens &t, float *panel) {
  const int width = t.vectors * kLanes;
  for (int token = 0; token < width; token += kLanes) {
    const int count = t.tokens - token < kLanes ? t.tokens - token : kLanes;
    const float *const x = t.x + t.feature + token * t.stride;
    float *const out = panel + token;
    int k = 0;
    if (count <= 0) {
      for (; k < t.features; ++k) store(out + k * width, Vec{});
      continue;
    }
    for (; k + kLanes <= t.features; k += kLanes) {
      Vec rows[kLanes];
      if (count == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) rows[i] = load(x + i * t.stride + k);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) rows[i] = i < count ? load(x + i * t.stride + k) : Vec{};
      }
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(out + (k + i) * width, rows[i]);
    }
    for (; k < t.features; ++k) {
      float column[kLanes] = {};
      for (int i = 0; i < count; ++i) column[i] = x[i * t.stride + k];
      store(out + k * width, load(column));
    }
  }
}

// Sixteen (or eight, or four) tokens at a time. The activation is known here.
template <int Kind>
static void unpack_as(const TokensOut &t) {
  const Activation how = {Kind, t.activation.alpha, t.activation.beta};
  const int width = t.vectors * kLanes;
  for (int token = 0; token < t.tokens; token += kLanes) {
    const int count = t.tokens - token < kLanes ? t.tokens - token : kLanes;
    for (int row = 0; row < t.rows; row += kLanes) {
      const int found = t.rows - row < kLanes ? t.rows - row : kLanes;
      const int64_t at = token * t.stride + t.row + row;
      const float *const sums = t.sums + row * width + token;
      Vec rows[kLanes];
      if (found == kLanes && count == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) rows[i] = load(sums + i * width);
        transpose(rows);
        if (t.residual) {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) rows[i] += load(t.residual + at + i * t.stride);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(t.y + at + i * t.stride, activate(rows[i], how));
        continue;
      }
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) rows[i] = i < found ? load(sums + i * width) : Vec{};
      transpose(rows);
      float finished[kLanes * kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(finished + i * kLanes, rows[i]);
      for (int i = 0; i < count; ++i) {
        Vec v = load(finished + i * kLanes);
        if (t.residual) v += load_some(t.residual + at + i * t.stride, found);
        store_some(t.y + at + i * t.stride, activate(v, how), found);
      }
    }
  }
}

static void unpack_tokens(const TokensOut &t) {
  with_kind(t.activation, [&](auto kind) { unpack_as<kind.value>(t); });
}

}  // namespace SECATEUR_ISA
}  // namespace secateur
