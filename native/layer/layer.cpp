#include "layer.h"

#include <algorithm>
#include <utility>

#include "ranges.h"
#include "scratch.h"

namespace secateur {
namespace {

// What the sums of a task may take of the second cache, beside weights that stream through it.
constexpr int64_t kSecondCache = 512 * 1024;

// How many parts to cut the rows into, so that sums stay in the second cache and the tasks keep
// all threads busy. Every part packs the input again, so as few as will do.
int parts_for(int64_t tiles, int64_t rows, int64_t row_bytes, int threads) {
  const int64_t fewest = std::min<int64_t>(64, (rows * row_bytes + kSecondCache - 1) / kSecondCache);
  int64_t best = fewest;
  double best_share = 0;
  for (int64_t parts = fewest;
       parts < fewest + std::min<int64_t>({int64_t{2} * threads, 16, std::max<int64_t>(1, rows / 16)});
       ++parts) {
    const int64_t tasks = tiles * parts;
    const int64_t rounds = (tasks + threads - 1) / threads;
    const double share = static_cast<double>(tasks) / static_cast<double>(rounds * threads);
    if (share > best_share + 0.05) {
      best = parts;
      best_share = share;
    }
  }
  return static_cast<int>(best);
}

// A plan is small, and streams are as large as the weights.
constexpr size_t kPlansKept = 1024, kStreamsKept = 64;

// Asks for the first lines of what kernels read through: they come while the input is packed.
void ask(const uint32_t *words, size_t bytes) {
  for (size_t i = 0; i < bytes; i += kLine) {
    __builtin_prefetch(reinterpret_cast<const char *>(words) + i);
  }
}

// Where each vector of a tile goes; false if a piece begins within one.
bool land(const Piece *pieces, int count, int lanes, int vectors, Landing *landings) {
  std::fill_n(landings, vectors, Landing{0, 0});
  const int64_t end = count ? pieces[count - 1].to + pieces[count - 1].length : 0;
  for (int i = 0; i < count; ++i) {
    const Piece &piece = pieces[i];
    if (piece.from % lanes) return false;
    for (int32_t j = 0; j < piece.length; j += lanes) {
      const int64_t to = piece.to + j;
      landings[(piece.from + j) / lanes] = {
          to, static_cast<int32_t>(std::min<int64_t>(lanes, end - to))};
    }
  }
  return true;
}

}  // namespace

struct Layer::Task {
  const float *x, *residual;
  float *y;
  int64_t height, width;  // of the input; tokens: 1 and tokens
  int64_t x_plane, y_plane;  // floats from one channel to the next
  int64_t tile, part;
};

Layer::Layer(const secateur_spec &spec, const secateur_weights &stored,
             const secateur_variant &variant, const KernelTable &table)
    : spec_(spec), variant_(variant), table_(table) {
  check(spec);
  const auto refuse = [](const std::string &what) { throw Error(SECATEUR_INVALID, what); };
  if (variant.family < SECATEUR_LIST || variant.family > SECATEUR_DEPTHWISE) {
    refuse("family is " + std::to_string(variant.family) + "; it must be from 0 to 5");
  }
  const bool half = variant.family == SECATEUR_HALF;
  if (half && !table.half_list) {
    refuse(std::string("half precision: ") + table.name + " does not multiply float16");
  }
  if (half && variant.vectors % 2) {
    refuse("vectors is " + std::to_string(variant.vectors) + "; half precision needs an even number");
  }
  const int64_t of_group = spec.outputs / spec.groups;
  if (variant.family == SECATEUR_BLOCKS) {
    if (variant.rows != 4 && variant.rows != 8 && variant.rows != 16) {
      refuse("blocks have " + std::to_string(variant.rows) + " rows; 4, 8 or 16 are possible");
    }
  } else {
    variant_.rows = variant.family == SECATEUR_PANELS ? kPanelRows : 1;
  }
  if (of_group % variant_.rows) {
    refuse("groups of " + std::to_string(of_group) + " outputs cannot be cut into blocks of " +
           std::to_string(variant_.rows) + " rows");
  }
  const bool tiled = variant.family != SECATEUR_GEMV && variant.family != SECATEUR_DEPTHWISE;
  if (tiled && (variant.vectors < 1 || variant.vectors > kMostVectors)) {
    refuse("vectors is " + std::to_string(variant.vectors) + "; it must be from 1 to " +
           std::to_string(kMostVectors));
  }
  if (variant.columns < 0) refuse("columns is " + std::to_string(variant.columns));
  if (variant.family == SECATEUR_GEMV && spec.kind != SECATEUR_LINEAR) {
    refuse("the gemv family is for linear layers");
  }
  if (variant.family == SECATEUR_DEPTHWISE && !Depthwise::suits(spec)) {
    refuse("the depthwise family is for one input channel a group, kernels of 3 x 3 or 5 x 5, "
           "stride 1 or 2 and no dilation");
  }
  weights_ = decode(spec, stored);
  nonzeros_ = weights_.nonzeros();
  if (variant.family == SECATEUR_GEMV) {
    gemv_ = std::make_unique<Gemv>(spec, weights_, stored.dtype, table.gemv_f32, table.gemv_bf16);
    weights_ = Weights();  // it has its own
  } else if (variant.family == SECATEUR_DEPTHWISE) {
    depthwise_ = std::make_unique<Depthwise>(spec, weights_, table);
    weights_ = Weights();
  }
}

void Layer::normalise(const float *scale, const float *shift, float epsilon) {
  if (spec_.kind != SECATEUR_LINEAR) {
    throw Error(SECATEUR_INVALID, "normalising is for linear layers, and this is a convolution");
  }
  if (!(epsilon >= 0)) {
    throw Error(SECATEUR_INVALID, "epsilon is " + std::to_string(epsilon) + "; it must not be negative");
  }
  scale_.assign(scale, scale + spec_.outputs);
  shift_.assign(spec_.outputs, 0.0f);
  if (shift) shift_.assign(shift, shift + spec_.outputs);
  epsilon_ = epsilon;
}

void Layer::norm(float *y, int64_t tokens) const {
  table_.normalise({y, tokens, spec_.outputs, scale_.data(), shift_.data(), epsilon_});
}

void Layer::shape(const int64_t dims[3], int64_t out[3]) const {
  for (int i = 0; i < 3; ++i) {
    if (dims[i] < 0 || dims[i] > int64_t{1} << 31) {
      throw Error(SECATEUR_INVALID, "an axis of the input is " + std::to_string(dims[i]));
    }
    out[i] = dims[i];
  }
  if (spec_.kind == SECATEUR_LINEAR) return;
  const Tiling tiling(spec_, dims[1], dims[2], 1, table_.lanes);
  out[1] = tiling.out_height;
  out[2] = tiling.out_width;
}

std::shared_ptr<const Layer::Plan> Layer::plan(const int64_t dims[3], int threads) const {
  const bool linear = spec_.kind == SECATEUR_LINEAR;
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto key = std::make_tuple(dims[0], dims[1], dims[2], threads);
  if (const auto found = plans_.find(key); found != plans_.end()) return found->second;
  const bool full = streams_.size() >= kStreamsKept;
  if (full) streams_.clear();
  if (full || plans_.size() >= kPlansKept) plans_.clear();
  const int64_t images = linear ? 1 : dims[0];
  // Two vectors of floats are one of halves.
  const int step = variant_.family == SECATEUR_HALF ? 2 : 1;
  Tiling tiling(spec_, linear ? 1 : dims[1], linear ? dims[0] : dims[2], variant_.vectors / step,
                table_.lanes * step);
  tiling.vectors *= step;
  const int parts = parts_for(images * tiling.tiles(), spec_.outputs,
                              int64_t{4} * tiling.vectors * table_.lanes, threads);
  const Shape shape{tiling.vectors, tiling.panel_rows, tiling.panel_cols, tiling.channel_floats, parts};
  auto laid_out = streams_.find(shape);
  if (laid_out == streams_.end()) {
    auto made = std::make_shared<Streams>(lay_out(spec_, weights_, variant_, tiling, parts));
    laid_out = streams_.emplace(shape, std::move(made)).first;
  }
  auto made = std::make_shared<Plan>(Plan{tiling, laid_out->second});
  return plans_.emplace(key, std::move(made)).first->second;
}

void Layer::run(const float *x, const int64_t dims[3], const float *residual, float *y,
                const Parallel &asked) const {
  const Parallel parallel = {asked.run, asked.context, std::max(1, asked.threads)};
  int64_t out[3];
  shape(dims, out);
  const bool linear = spec_.kind == SECATEUR_LINEAR;
  if (dims[0] == 0) return;
  if (depthwise_) return depthwise_->run(x, dims, out, residual, y, parallel);
  if (gemv_) {
    gemv_->run(x, dims[0], residual, y, parallel);
    if (!scale_.empty()) norm(y, dims[0]);
    return;
  }
  const auto plan = this->plan(dims, parallel.threads);
  const int64_t images = linear ? 1 : dims[0];
  const int64_t tiles = plan->tiling.tiles();
  const int64_t parts = static_cast<int64_t>(plan->streams->parts.size());
  const int64_t in = linear ? 0 : int64_t{spec_.inputs} * spec_.groups * dims[1] * dims[2];
  const int64_t image = linear ? 0 : int64_t{spec_.outputs} * out[1] * out[2];
  const int64_t total = images * tiles * parts;
  Ranges ranges(total, parallel.threads);
  parallel(static_cast<size_t>(total), [&](size_t) {
    const int64_t at = ranges.take();
    const int64_t n = at / (tiles * parts), rest = at % (tiles * parts);
    run_task(*plan, {x + n * in, residual ? residual + n * image : nullptr, y + n * image,
                     linear ? 1 : dims[1], linear ? dims[0] : dims[2], dims[1] * dims[2],
                     out[1] * out[2], rest / parts, rest % parts});
  });
  if (scale_.empty() || parts == 1) return;
  // No task had whole tokens.
  constexpr int64_t kTokens = 16;
  parallel(static_cast<size_t>((dims[0] + kTokens - 1) / kTokens), [&](size_t i) {
    const int64_t first = static_cast<int64_t>(i) * kTokens;
    norm(y + first * spec_.outputs, std::min(kTokens, dims[0] - first));
  });
}

bool Layer::takes_bands() const {
  return depthwise_ || (spec_.kind == SECATEUR_CONV && Tiling::takes_plain(spec_));
}

void Layer::run_band(const Band &band) const {
  if (depthwise_) return depthwise_->run_channels(band, 0, spec_.outputs);
  const int64_t dims[3] = {1, band.height, band.width};
  const auto plan = this->plan(dims, 1);
  const int64_t parts = static_cast<int64_t>(plan->streams->parts.size());
  for (int64_t i = 0; i < plan->tiling.tiles() * parts; ++i) {
    run_task(*plan, {band.x, band.residual, band.y, band.height, band.width, band.x_plane,
                     band.y_plane, i / parts, i % parts});
  }
}

void Layer::run_task(const Plan &plan, const Task &task) const {
  thread_local Scratch panels, halved, waiting;
  const Tiling &tiling = plan.tiling;
  const Streams &streams = *plan.streams;
  const Streams::Part &part = streams.parts[task.part];
  const bool linear = spec_.kind == SECATEUR_LINEAR;
  const int64_t channels = int64_t{spec_.inputs} * spec_.groups;
  const int64_t spare = (tiling.vectors + 2) * table_.lanes;
  const int64_t width = int64_t{tiling.vectors} * table_.lanes;
  float *const panel =
      panels.floats(streams.channels_of_block * tiling.channel_floats + spare + tiling.panel_cols);
  float *const sums = waiting.floats(part.rows * width + spare);
  const bool half = variant_.family == SECATEUR_HALF;
  const int64_t panel_floats = streams.channels_of_block * tiling.channel_floats + spare;
  void *const halves = half ? halved.floats(panel_floats / 2 + spare) : nullptr;

  const int64_t down = task.tile / tiling.tiles_across, across = task.tile % tiling.tiles_across;
  const int64_t row0 = down * tiling.rows, col0 = across * tiling.cols;
  const int64_t plane = tiling.out_height * tiling.out_width;
  const int64_t positions = tiling.plain ? std::min(tiling.cols, plane - col0) : 0;
  Piece pieces[kMostVectors * 16];
  int piece_count = 0;
  if (tiling.plain) {
    pieces[piece_count++] = {0, static_cast<int32_t>(positions), col0};
  } else {
    int64_t length = std::min(tiling.cols, tiling.out_width - col0);
    int64_t rows = std::min(tiling.rows, tiling.out_height - row0);
    if (tiling.panel_cols == tiling.out_width) {  // no columns between the rows
      length *= rows;
      rows = 1;
    }
    for (int64_t r = 0; r < rows; ++r) {
      pieces[piece_count++] = {static_cast<int32_t>(r * tiling.panel_cols),
                               static_cast<int32_t>(length),
                               (row0 + r) * tiling.out_width + col0};
    }
  }
  Landing landings[kMostVectors];
  const bool whole_vectors = land(pieces, piece_count, table_.lanes, tiling.vectors, landings);
  const Activation activation = {spec_.activation, spec_.alpha, spec_.beta};
  Work work = {nullptr, nullptr, nullptr, nullptr,
               reinterpret_cast<const char *>(half ? halves : panel), sums,
               static_cast<uint32_t>(part.first_row), weights_.bias.data(), tiling.vectors,
               variant_.rows, linear ? nullptr : task.y, task.residual, task.y_plane, pieces, piece_count,
               whole_vectors ? landings : nullptr, activation};
  const auto kernel = half                                 ? table_.half_list
                      : variant_.family == SECATEUR_LIST   ? table_.list
                      : variant_.family == SECATEUR_PANELS ? table_.panels
                                                           : table_.blocks;
  for (int64_t block = 0; block < streams.blocks; ++block) {
    const Streams::Block &records = part.blocks[block];
    if (records.begin == records.end) continue;
    const uint32_t *const words = part.words.data();
    work.stream = words + records.begin;
    work.stream_end = words + records.end;
    work.wheres = words + records.wheres;
    work.weights = words + records.weights;
    ask(words + records.begin, kAskedAhead * sizeof(uint16_t));
    if (records.weights) {  // of lists
      ask(words + records.wheres, kAskedAhead * sizeof(uint16_t));
      ask(words + records.weights, kAskedAhead * sizeof(float));
    }
    const int32_t channel = static_cast<int32_t>(block * streams.channels_of_block);
    const int32_t count =
        static_cast<int32_t>(std::min(streams.channels_of_block, channels - channel));
    if (linear) {
      table_.pack_tokens({task.x + col0 * channels, channels, static_cast<int32_t>(positions),
                          tiling.vectors, channel, count},
                         panel);
    } else if (tiling.plain) {
      table_.pack_plane(task.x + channel * task.x_plane + col0, task.x_plane, count,
                        static_cast<int32_t>(positions), tiling.vectors, panel);
    } else {
      table_.pack_window({task.x, task.height, task.width, channel, count,
                          spec_.stride[0], spec_.stride[1], row0, col0, tiling.panel_rows,
                          tiling.panel_cols, spec_.pads[0], spec_.pads[1],
                          static_cast<int32_t>(tiling.phases.size() / 2), tiling.phases.data(),
                          tiling.channel_floats},
                         panel);
    }
    if (half) table_.halve(panel, count * tiling.channel_floats + spare, halves);
    kernel(work);
  }
  if (linear) {
    const int64_t at = col0 * spec_.outputs;
    table_.unpack_tokens({sums, task.residual ? task.residual + at : nullptr, task.y + at,
                          spec_.outputs, static_cast<int32_t>(positions), tiling.vectors,
                          static_cast<int32_t>(part.first_row), static_cast<int32_t>(part.rows),
                          activation});
    if (!scale_.empty() && streams.parts.size() == 1) norm(task.y + at, positions);
  }
}

int64_t Layer::bytes() const {
  if (gemv_) return gemv_->bytes();
  if (depthwise_) return depthwise_->bytes();
  const std::lock_guard<std::mutex> lock(mutex_);
  int64_t all = nonzeros_ * 8 + weights_.rows * 12;
  for (const auto &[shape, streams] : streams_) all += streams->bytes();
  return all;
}

}  // namespace secateur
