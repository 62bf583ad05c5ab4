// Activations into panels, and finished sums of tokens back into rows.
#pragma once

#include "finish.h"

namespace secateur {
namespace SECATEUR_ISA {

// Copies count floats to dst and may write up to a vector more; reads nothing at or past end.
static inline void copy_row(float *dst, const float *src, int count, const float *end) {
  int j = 0;
  for (; j < count && src + j + kLanes <= end; j += kLanes) store(dst + j, load(src + j));
  for (; j < count; ++j) dst[j] = src[j];
}

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

// Every second float, as copy_row copies every one.
static inline void copy_evens(float *dst, const float *src, int count, const float *end) {
  int j = 0;
  for (; j < count && src + 2 * j + 2 * kLanes <= end; j += kLanes) {
    store(dst + j, evens(load(src + 2 * j), load(src + 2 * j + kLanes)));
  }
  for (; j < count; ++j) dst[j] = src[2 * j];
}

static void pack_window(const Window &w, float *panel) {
  const int64_t image = w.height * w.width;
  for (int c = 0; c < w.channels; ++c) {
    const float *const x = w.x + (w.channel + c) * image;
    float *dst = panel + c * w.channel_floats;
    for (int phase = 0; phase < w.phase_count; ++phase) {
      const int64_t py = w.phases[2 * phase] - w.pad_y, px = w.phases[2 * phase + 1] - w.pad_x;
      // Columns [begin, stop) of the panel's rows lie inside the image.
      const int64_t left = w.col0 * w.stride_x + px;
      int64_t begin = left >= 0 ? 0 : (-left + w.stride_x - 1) / w.stride_x;
      int64_t stop = left < w.width ? (w.width - left + w.stride_x - 1) / w.stride_x : 0;
      if (begin > w.cols) begin = w.cols;
      if (stop > w.cols) stop = w.cols;
      if (stop < begin) stop = begin;
      for (int r = 0; r < w.rows; ++r, dst += w.cols) {
        const int64_t iy = (w.row0 + r) * w.stride_y + py;
        if (iy < 0 || iy >= w.height) {
          zero_row(dst, w.cols);
          continue;
        }
        const int count = static_cast<int>(stop - begin);
        const float *const src = x + iy * w.width + left + begin * w.stride_x;
        zero_row(dst, static_cast<int>(begin));
        if (w.stride_x == 1) {
          copy_row(dst + begin, src, count, w.x_end);
        } else if (w.stride_x == 2) {
          copy_evens(dst + begin, src, count, w.x_end);
        } else {
          for (int j = 0; j < count; ++j) dst[begin + j] = src[j * w.stride_x];
        }
        zero_row(dst + stop, static_cast<int>(w.cols - stop));
      }
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
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) rows[i] = i < count ? load(x + i * t.stride + k) : Vec{};
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

static void unpack_tokens(const TokensOut &t) {
  const int width = t.vectors * kLanes;
  for (int token = 0; token < t.tokens; token += kLanes) {
    const int count = t.tokens - token < kLanes ? t.tokens - token : kLanes;
    for (int row = 0; row < t.rows; row += kLanes) {
      const int found = t.rows - row < kLanes ? t.rows - row : kLanes;
      Vec rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        rows[i] = i < found ? load(t.sums + (row + i) * width + token) : Vec{};
      }
      transpose(rows);
      float finished[kLanes * kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(finished + i * kLanes, rows[i]);
      for (int i = 0; i < count; ++i) {
        const int64_t at = (token + i) * t.stride + t.row + row;
        Vec v = load(finished + i * kLanes);
        if (found == kLanes) {
          if (t.residual) v += load(t.residual + at);
          store(t.y + at, activate(v, t.activation));
        } else {
          if (t.residual) v += load_some(t.residual + at, found);
          store_some(t.y + at, activate(v, t.activation), found);
        }
      }
    }
  }
}

}  // namespace SECATEUR_ISA
}  // namespace secateur
