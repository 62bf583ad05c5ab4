#include "chain.h"

#include <algorithm>
#include <string>
#include <utility>

#include "ranges.h"
#include "scratch.h"

namespace secateur {
namespace {

// What lies between the layers of a band may take so much of the second cache: of 512 KiB on the
// processors with the smallest, where a part that leaves it costs less than bands of one row.
constexpr int64_t kBetween = 640 * 1024;
// Floats before, between and behind what layers hand on: kernels load whole vectors.
constexpr int64_t kSlack = 256;

int64_t up(int64_t floats) { return (floats + 15) / 16 * 16; }

}  // namespace

struct Chain::Run {
  const std::vector<Image> &images;
  const float *x;
  int64_t count;  // of images
  const float *residual;
  float *y;
};

Chain::Chain(std::vector<const Layer *> layers) : layers_(std::move(layers)) {
  const auto refuse = [](const std::string &what) { throw Error(SECATEUR_INVALID, what); };
  if (layers_.size() < 2) refuse("a chain has at least two layers");
  for (size_t i = 0; i < layers_.size(); ++i) {
    const std::string which = "layer " + std::to_string(i + 1) + " of the chain ";
    if (!layers_[i]->takes_bands()) {
      refuse(which + "is neither depthwise nor a convolution of single pixels");
    }
    const secateur_spec &spec = layers_[i]->spec();
    const int64_t takes = int64_t{spec.inputs} * spec.groups;
    if (i && takes != layers_[i - 1]->spec().outputs) {
      refuse(which + "takes " + std::to_string(takes) + " channels, and the one before has " +
             std::to_string(layers_[i - 1]->spec().outputs));
    }
  }
}

std::vector<Chain::Image> Chain::images(const int64_t dims[3]) const {
  const secateur_spec &first = layers_[0]->spec();
  std::vector<Image> images = {{int64_t{first.inputs} * first.groups, dims[1], dims[2]}};
  int64_t at[3] = {dims[0], dims[1], dims[2]}, out[3];
  for (const Layer *layer : layers_) {
    layer->shape(at, out);
    images.push_back({layer->spec().outputs, out[1], out[2]});
    std::copy_n(out, 3, at);
  }
  return images;
}

void Chain::shape(const int64_t dims[3], int64_t out[3]) const {
  const Image last = images(dims).back();
  out[0] = dims[0], out[1] = last.height, out[2] = last.width;
}

// What rows of every layer's input the last rows need.
std::vector<Chain::Rows> Chain::rows_for(const std::vector<Image> &images, Rows last) const {
  std::vector<Rows> rows(images.size());
  rows.back() = last;
  for (size_t i = layers_.size(); i-- > 0;) {
    const secateur_spec &spec = layers_[i]->spec();
    const int64_t top = rows[i + 1].begin * spec.stride[0] - spec.pads[0];
    const int64_t bottom = (rows[i + 1].end - 1) * spec.stride[0] - spec.pads[0] + spec.kernel[0];
    // All taps of a band may lie in the padding; a row is there all the same, so that memory is.
    rows[i].begin = std::min(std::max<int64_t>(0, top), images[i].height - 1);
    rows[i].end = std::max(std::min(images[i].height, bottom), rows[i].begin + 1);
    rows[i].pad = static_cast<int32_t>(rows[i].begin - top);
  }
  return rows;
}

int64_t Chain::floats(const std::vector<Image> &images, const std::vector<Rows> &rows) const {
  int64_t all = kSlack;
  for (size_t i = 1; i < layers_.size(); ++i) {
    all += images[i].channels * up((rows[i].end - rows[i].begin) * images[i].width) + kSlack;
  }
  return all;
}

// As few as let what lies between the layers stay in the cache, and as many for each thread.
int64_t Chain::bands_for(const std::vector<Image> &images, int threads) const {
  const int64_t height = images.back().height;
  const auto bytes = [&](int64_t rows) {  // of a band in the middle
    const int64_t begin = (height - rows) / 2;
    return 4 * floats(images, rows_for(images, {begin, begin + rows, 0}));
  };
  int64_t rows = 1;  // one row may need more than there is
  for (int64_t above = height + 1; above - rows > 1;) {
    const int64_t middle = rows + (above - rows) / 2;
    (bytes(middle) > kBetween ? above : rows) = middle;
  }
  const int64_t fewest = (height + rows - 1) / rows;
  return std::min(height, (fewest + threads - 1) / threads * threads);
}

void Chain::run(const float *x, const int64_t dims[3], const float *residual, float *y,
                const Parallel &asked) const {
  const Parallel parallel = {asked.run, asked.context, std::max(1, asked.threads)};
  const std::vector<Image> images = this->images(dims);
  if (dims[0] == 0) return;
  const Run run = {images, x, dims[0], residual, y};
  const int64_t height = images.back().height, bands = bands_for(images, parallel.threads);
  Ranges ranges(dims[0] * bands, parallel.threads);
  parallel(static_cast<size_t>(dims[0] * bands), [&](size_t) {
    const int64_t at = ranges.take(), image = at / bands, band = at % bands;
    run_band(run, image, {height * band / bands, height * (band + 1) / bands, 0});
  });
}

void Chain::run_band(const Run &run, int64_t image, Rows last) const {
  thread_local Scratch scratch;
  const std::vector<Image> &images = run.images;
  const std::vector<Rows> rows = rows_for(images, last);
  const auto plane = [&](size_t i) { return images[i].height * images[i].width; };
  const int64_t all = floats(images, rows);
  float *const memory = scratch.floats(static_cast<size_t>(all));
  const Image in = images.front(), out = images.back();
  const int64_t from = image * in.channels * plane(0) + rows.front().begin * in.width;
  const int64_t to = image * out.channels * plane(layers_.size()) + last.begin * out.width;
  Band band = {run.x + from, run.x, run.x + run.count * in.channels * plane(0), plane(0),
               0, 0, 0, nullptr, nullptr, 0, 0, 0};
  float *next = memory + kSlack;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const bool is_last = i + 1 == layers_.size();
    band.height = rows[i].end - rows[i].begin, band.width = images[i].width;
    band.pad_y = rows[i].pad;
    band.out_height = rows[i + 1].end - rows[i + 1].begin, band.out_width = images[i + 1].width;
    band.y = is_last ? run.y + to : next;
    band.y_plane = is_last ? plane(i + 1) : up(band.out_height * band.out_width);
    band.residual = is_last && run.residual ? run.residual + to : nullptr;
    layers_[i]->run_band(band);
    band.x = band.y, band.x_plane = band.y_plane;
    band.begin = memory, band.end = memory + all;
    next += images[i + 1].channels * band.y_plane + kSlack;
  }
}

}  // namespace secateur
