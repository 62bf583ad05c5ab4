// What a layer asks of the kernels of one instruction set. Plain data: shared by all of them.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "gemv_types.h"

namespace secateur {

// Widest tile, in vectors: 14 accumulators, a weight and a spare fit into 16 registers.
constexpr int kMostVectors = 14;
constexpr int kPanelRows = 4;

// Lists come in three arrays: a head for every record, and for every entry where in the packed panel,
// in values, and the weight. The `where`s of a record fill whole words, four a word, lowest first, so
// that a kernel can read them ahead, over the end of a record.
struct Head {
  uint32_t row_and_flags;
  uint32_t count;
};
constexpr int kWheres = 4;
constexpr int kWordsAhead = 2;
// Lists of large models come from memory. A kernel asks for what it takes so many entries ahead; for the
// first ones it is asked before.
constexpr uint32_t kAskedAhead = 512;
constexpr uint32_t kLine = 64;  // bytes of a line of a cache
// A packed block has so many values at most.
constexpr int64_t kMostPanel = int64_t{1} << 16;
// The first and the last record of a row (or of a group of rows) among all blocks of channels.
constexpr uint32_t kFirst = 1u << 30;
constexpr uint32_t kLast = 1u << 31;
constexpr uint32_t kRowMask = kFirst - 1;

// Positions of a tile that lie side by side in the output.
struct Piece {
  int32_t from;    // position in the tile
  int32_t length;  // floats
  int64_t to;      // position in the plane of an output channel
};

// Where a vector of a tile goes. As vectors go out in ascending order, one may spill over the end of
// its piece: the next one overwrites that.
struct Landing {
  int64_t to;      // position in the plane of an output channel
  int32_t length;  // floats
};

struct Activation {
  int32_t kind;
  float alpha, beta;
};

// One block of channels of one tile.
struct Work {
  const void *stream, *stream_end;  // records; of lists the heads
  const uint32_t *wheres;           // of lists
  const void *weights;
  const char *panel;     // packed activations
  float *sums;           // [row][vectors]: where sums wait between blocks
  uint32_t first_row;    // row of sums[0]
  const float *bias;     // one a row
  int32_t vectors;       // width of the tile
  int32_t rows;          // of a block
  // Where finished rows go. For tokens, y is null: they stay in sums until all are there.
  float *y;
  const float *residual;
  int64_t plane;         // floats from one output channel to the next
  const Piece *pieces;
  int32_t piece_count;
  const Landing *landings;  // of each vector; null where a piece begins within one
  Activation activation;
};

// Channels [channel, channel + channels) of the window of input that a tile needs, cut into phases:
// panel[c][phase][row][col] = x[c][(row0 + row) * stride + phase.y][(col0 + col) * stride + phase.x]
// and 0 outside the image.
struct Window {
  const float *x;  // one image
  int64_t height, width;
  int32_t channel, channels;
  int32_t stride_y, stride_x;
  int64_t row0, col0;      // first row and column of the output's tile
  int32_t rows, cols;      // of a phase in the panel
  int32_t pad_y, pad_x;
  int32_t phase_count;
  const int32_t *phases;   // pairs y, x
  int64_t channel_floats;  // from one channel of the panel to the next
};

// features [feature, feature + features) of tokens [0, tokens), as panel[feature][vectors].
struct Tokens {
  const float *x;
  int64_t stride;  // floats from one token to the next
  int32_t tokens, vectors;
  int32_t feature, features;
};

// Finished sums of rows [row, row + rows) go to y[token][row].
struct TokensOut {
  const float *sums;
  const float *residual;
  float *y;
  int64_t stride;
  int32_t tokens, vectors;
  int32_t row, rows;
  Activation activation;
};

// One channel of a depthwise convolution. Some floats before and behind x may be read.
// Some channels: planes of x, y and the residual, and weights, lie one after the other.
struct DepthwiseWork {
  const float *x;
  float *y;
  const float *residual;
  const float *weights;  // kernel * kernel of each channel
  const float *bias;
  int64_t channels;
  int64_t height, width, out_height, out_width;
  int64_t x_plane, y_plane;  // floats from one channel to the next
  int32_t pad_y, pad_x;
  int32_t kernel, stride;
  Activation activation;
};

// Queries of one head. A stride is floats from one position to the next, of queries and keys, or of values
// and y; masks have one row of keys for every query.
struct AttentionWork {
  const float *q, *k, *v;
  const float *mask;  // or null
  float *y;
  float *scratch;  // as many floats as attention_scratch says
  int64_t stride, value_stride;
  int32_t rows, keys;
  int32_t size, value_size;
  float scale;
};

// Tokens to be normalised in place, one after the other.
struct NormWork {
  float *y;
  int64_t tokens, features;
  const float *scale, *shift;  // one a feature
  float epsilon;
};

struct KernelTable {
  const char *name;
  int lanes;
  int registers;
  void (*list)(const Work &);
  void (*panels)(const Work &);
  void (*blocks)(const Work &);
  void (*depthwise)(const DepthwiseWork &);
  void (*half_list)(const Work &);  // null where the machine does not multiply float16
  void (*halve)(const float *from, int64_t count, void *to);
  // channels x vectors of a plane whose rows lie at x + c * plane; floats past valid are 0.
  void (*pack_plane)(const float *x, int64_t plane, int32_t channels, int32_t valid,
                     int32_t vectors, float *panel);
  void (*pack_window)(const Window &, float *panel);
  void (*pack_tokens)(const Tokens &, float *panel);
  void (*unpack_tokens)(const TokensOut &);
  void (*normalise)(const NormWork &);
  void (*attention)(const AttentionWork &);
  int64_t (*attention_scratch)(const AttentionWork &);
  GemvKernel gemv_f32, gemv_bf16;
};

extern const KernelTable table_baseline, table_avx2, table_avx512, table_avx512fp16, table_neon,
    table_neonfp16;

}  // namespace secateur
