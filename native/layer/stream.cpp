#include "stream.h"

#include <algorithm>
#include <cstring>

#include "../kernels/table.h"

namespace secateur {
namespace {

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct Place {
  int64_t block;
  uint32_t where;
};

// Where a column of the weights lies in the packed panel.
class Places {
 public:
  Places(const secateur_spec &spec, const Tiling &tiling, int64_t channels_of_block,
         int64_t unit)
      : taps_(int64_t{spec.kernel[0]} * spec.kernel[1]),
        inputs_(spec.inputs),
        outputs_of_group_(spec.outputs / spec.groups),
        channel_floats_(tiling.channel_floats),
        channels_of_block_(channels_of_block),
        unit_(unit) {
    for (int ky = 0; ky < spec.kernel[0]; ++ky) {
      for (int kx = 0; kx < spec.kernel[1]; ++kx) {
        shifts_.push_back(tiling.shift(spec, ky, kx));
      }
    }
  }

  Place operator()(int64_t row, int64_t column) const {
    const int64_t channel = row / outputs_of_group_ * inputs_ + column / taps_;
    const int64_t in_block = channel % channels_of_block_;
    const int64_t values = in_block * channel_floats_ + shifts_[column % taps_];
    return {channel / channels_of_block_, static_cast<uint32_t>(values * unit_)};
  }

 private:
  int64_t taps_, inputs_, outputs_of_group_, channel_floats_, channels_of_block_,
      unit_;  // of a where, in a value
  std::vector<int64_t> shifts_;
};

// One column that some rows of a group use, with a weight for each of them (0 where it has none).
struct Column {
  uint32_t where;
  uint32_t used;  // bit i: row i has a weight here
  float weights[16];
};

// Rows [row, row + rows) merged by column, split by block of channels.
std::vector<std::vector<Column>> merged(const Weights &weights, const Places &places, int64_t row,
                                        int rows, int64_t blocks) {
  std::vector<std::vector<Column>> out(static_cast<size_t>(blocks));
  int64_t at[16];
  for (int i = 0; i < rows; ++i) at[i] = weights.starts[row + i];
  while (true) {
    int64_t next = INT64_MAX;
    for (int i = 0; i < rows; ++i) {
      if (at[i] < weights.starts[row + i + 1]) {
        next = std::min<int64_t>(next, weights.column[at[i]]);
      }
    }
    if (next == INT64_MAX) return out;
    const Place place = places(row, next);
    Column column{place.where, 0, {}};
    for (int i = 0; i < rows; ++i) {
      if (at[i] < weights.starts[row + i + 1] && weights.column[at[i]] == next) {
        column.weights[i] = weights.value[at[i]++];
        column.used |= 1u << i;
      }
    }
    out[place.block].push_back(column);
  }
}

// Rounds to the nearest float16, ties to even; too large becomes infinity.
uint32_t half_bits_of(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000;
  const uint32_t size = bits & 0x7FFFFFFF;
  if (size > 0x7F800000) return sign | 0x7E00;
  if (size >= 0x477FF000) return sign | 0x7C00;  // from 65520 on
  // Adding 2^k makes the processor round at the last place of the result.
  float magnitude;
  std::memcpy(&magnitude, &size, sizeof magnitude);
  if (size < 0x38800000) {  // subnormal: multiples of 2^-24
    return sign | (bits_of(magnitude + 0.5f) - bits_of(0.5f));
  }
  const uint32_t odd = size >> 13 & 1;
  return sign | ((size + 0xFFF + odd - (112u << 23)) >> 13);
}

void write_block(std::vector<uint32_t> &words, uint32_t head, int rows,
                 const std::vector<Column> &columns) {
  words.push_back(head);
  words.push_back(static_cast<uint32_t>(columns.size()));
  for (const Column &column : columns) {
    words.push_back(column.where);
    for (int i = 0; i < rows; ++i) words.push_back(bits_of(column.weights[i]));
  }
}

void write_panel(std::vector<uint32_t> &words, uint32_t head, const std::vector<Column> &columns) {
  const uint32_t row = head & kRowMask;
  words.insert(words.end(), {head, row + 1, row + 2, row + 3});
  const size_t counts = words.size() - 1;  // counts[1] is that of pattern 1
  words.resize(words.size() + 15, 0);
  for (const Column &column : columns) ++words[counts + column.used];
  for (uint32_t pattern = 1; pattern < 16; ++pattern) {
    for (const Column &column : columns) {
      if (column.used != pattern) continue;
      words.push_back(column.where);
      for (int i = 0; i < kPanelRows; ++i) {
        if (pattern >> i & 1) words.push_back(bits_of(column.weights[i]));
      }
    }
  }
}

// A group of rows in one block of channels, before the groups are sorted.
struct Record {
  size_t length;
  uint32_t head;
  std::vector<Column> columns;
};

bool is_list(const secateur_variant &variant) {
  return variant.family == SECATEUR_LIST || variant.family == SECATEUR_HALF;
}

// Heads, then wheres, then weights. Each array begins at an even word.
Streams::Block write_lists(std::vector<uint32_t> &words, const std::vector<Record> &records,
                           bool half) {
  const auto even = [&] {
    if (words.size() % 2) words.push_back(0);
    return words.size();
  };
  Streams::Block block{even(), 0, 0, 0};
  for (const Record &record : records) {
    words.push_back(record.head);
    words.push_back(static_cast<uint32_t>(record.columns.size()));
  }
  block.end = block.wheres = words.size();
  for (const Record &record : records) {
    for (size_t i = 0; i < record.columns.size(); i += kWheres) {
      uint64_t word = 0;
      for (size_t j = 0; j < kWheres && i + j < record.columns.size(); ++j) {
        word |= uint64_t{record.columns[i + j].where} << 16 * j;
      }
      words.resize(words.size() + 2);
      std::memcpy(&words[words.size() - 2], &word, sizeof word);
    }
  }
  words.insert(words.end(), 2 * kWordsAhead, 0);  // read ahead of the last record
  block.weights = words.size();
  size_t count = 0;
  for (const Record &record : records) {
    for (const Column &column : record.columns) {
      const uint32_t bits = half ? half_bits_of(column.weights[0]) : bits_of(column.weights[0]);
      if (half && count++ % 2) {
        words.back() |= bits << 16;
      } else {
        words.push_back(bits);
      }
    }
  }
  words.insert(words.end(), 3, 0);  // the last weights are loaded four at a time
  return block;
}

Streams::Part lay_out_part(const Weights &weights, const Places &places,
                           const secateur_variant &variant, int64_t blocks, int64_t first_row,
                           int64_t rows) {
  const int step = variant.rows;
  std::vector<std::vector<Record>> records(static_cast<size_t>(blocks));
  for (int64_t row = first_row; row < first_row + rows; row += step) {
    auto columns = merged(weights, places, row, step, blocks);
    int64_t first = 0, last = 0;
    for (int64_t b = blocks - 1; b >= 0; --b) first = columns[b].empty() ? first : b;
    for (int64_t b = 0; b < blocks; ++b) last = columns[b].empty() ? last : b;
    last = std::max(first, last);
    for (int64_t b = 0; b < blocks; ++b) {
      // A row without weights has one empty record, which writes its bias.
      if (columns[b].empty() && b != first) continue;
      const uint32_t flags = (b == first ? kFirst : 0) | (b == last ? kLast : 0);
      records[b].push_back(
          {columns[b].size(), static_cast<uint32_t>(row) | flags, std::move(columns[b])});
    }
  }
  Streams::Part part{first_row, rows, {}, {}};
  for (auto &block : records) {
    // Equal loop lengths side by side: the processor predicts where each ends.
    std::stable_sort(block.begin(), block.end(),
                     [](const Record &a, const Record &b) { return a.length > b.length; });
    if (is_list(variant)) {
      part.blocks.push_back(write_lists(part.words, block, variant.family == SECATEUR_HALF));
      continue;
    }
    const size_t begin = part.words.size();
    for (const Record &record : block) {
      if (variant.family == SECATEUR_PANELS) {
        write_panel(part.words, record.head, record.columns);
      } else {
        write_block(part.words, record.head, step, record.columns);
      }
    }
    part.blocks.push_back({begin, part.words.size(), 0, 0});
  }
  return part;
}

}  // namespace

int64_t Streams::bytes() const {
  int64_t all = 0;
  for (const Part &part : parts) all += static_cast<int64_t>(part.words.size() * sizeof(uint32_t));
  return all;
}

Streams lay_out(const secateur_spec &spec, const Weights &weights,
                const secateur_variant &variant, const Tiling &tiling, int parts) {
  const int64_t channels = int64_t{spec.inputs} * spec.groups;
  Streams out;
  const bool half = variant.family == SECATEUR_HALF;
  const int64_t value_bytes = half ? 2 : 4;
  const int64_t fits = std::max<int64_t>(1, kFirstCache / (tiling.channel_floats * value_bytes));
  out.channels_of_block = std::min<int64_t>(channels, variant.columns ? variant.columns : fits);
  if (is_list(variant)) {
    out.channels_of_block =
        std::min(out.channels_of_block, std::max<int64_t>(1, kMostPanel / tiling.channel_floats));
  }
  // Blocks of one size.
  out.blocks = (channels + out.channels_of_block - 1) / out.channels_of_block;
  out.channels_of_block = (channels + out.blocks - 1) / out.blocks;
  out.blocks = (channels + out.channels_of_block - 1) / out.channels_of_block;
  const int64_t most = is_list(variant) ? kMostPanel : int64_t{1} << 29;
  if (out.channels_of_block * tiling.channel_floats > most) {
    throw Error(SECATEUR_INVALID, "a tile of " + std::to_string(out.channels_of_block) +
                                      " channels of " + std::to_string(tiling.channel_floats) +
                                      " floats is larger than " + std::to_string(most) + " floats");
  }
  const Places places(spec, tiling, out.channels_of_block, is_list(variant) ? 1 : value_bytes);
  // Parts of about as many weights, each a whole number of groups of rows.
  const int64_t step = variant.rows, total = weights.nonzeros() + weights.rows;
  int64_t row = 0;
  for (int i = 0; i < parts && row < weights.rows; ++i) {
    const int64_t goal = total * (i + 1) / parts;
    int64_t stop = row;
    while (stop < weights.rows && (i + 1 == parts || weights.starts[stop] + stop < goal)) {
      stop += step;
    }
    if (stop == row) continue;
    out.parts.push_back(lay_out_part(weights, places, variant, out.blocks, row, stop - row));
    row = stop;
  }
  return out;
}

}  // namespace secateur
