// Which variants are worth timing.
#include <algorithm>

#include "layer.h"

namespace secateur {

std::vector<secateur_variant> candidates(const secateur_spec &spec, int64_t positions,
                                         double density, const KernelTable &table) {
  std::vector<secateur_variant> out;
  const auto add = [&](int family, int rows, int vectors, int columns) {
    const secateur_variant made = {family, rows, vectors, columns};
    for (const auto &known : out) {
      if (known.family == family && known.rows == rows && known.vectors == vectors &&
          known.columns == columns) {
        return;
      }
    }
    out.push_back(made);
  };
  if (spec.kind == SECATEUR_LINEAR && positions <= 16) add(SECATEUR_GEMV, 1, 1, 0);
  // The other kernels go through many positions at once: one or two leave most of their lanes idle.
  // They only pay where they read less than a bit for every weight that there could be.
  if (!out.empty() && positions <= 2 && density > 1.0 / 64) return out;
  if (Depthwise::suits(spec)) add(SECATEUR_DEPTHWISE, 1, 1, 0);
  // Wide tiles read the weights less often; narrow ones let more channels stay in the first cache,
  // and may fill a small image better. Tiles wider than the image are all alike.
  const int whole = static_cast<int>(
      std::min<int64_t>(kMostVectors, std::max<int64_t>(1, (positions + table.lanes - 1) / table.lanes)));
  const int channels = spec.inputs * spec.groups;
  const int of_group = spec.outputs / spec.groups;
  // Where four rows share most of their columns, lists load everything again for each row.
  const bool shared = density > 0.6 && of_group % kPanelRows == 0;
  // Channels of which the first cache holds the panel, roughly, if it has so many copies of the image.
  const auto fits = [&](int vectors, int copies) {
    const int64_t panel = int64_t{vectors} * table.lanes * 4 * copies;
    return static_cast<int>(std::max<int64_t>(1, kFirstCache / panel));
  };
  for (const int vectors : {8, 4, 14, 6, 11}) {
    if (shared) break;
    const int narrowed = std::min(vectors, whole);
    add(SECATEUR_LIST, 1, narrowed, 0);
    // Sums are written and read again once a block of channels: with few weights a block, larger
    // blocks pay even where they leave the first cache.
    for (const int times : {2, 4}) {
      if (times > 2 && density > 0.12) break;
      const int larger = times * fits(narrowed, spec.kernel[1]);
      if (larger < channels) add(SECATEUR_LIST, 1, narrowed, larger);
    }
  }
  if (density > 0.1 && of_group % kPanelRows == 0) {
    const int taps = spec.kernel[0] * spec.kernel[1];
    for (const int vectors : {8, 4, 11}) {
      const int narrowed = std::min(vectors, whole);
      add(SECATEUR_PANELS, kPanelRows, narrowed, std::min(channels, 3 * fits(narrowed, taps)));
    }
  }
  for (const int rows : {4, 8, 16}) {
    if (of_group % rows == 0) add(SECATEUR_BLOCKS, rows, std::min(rows == 4 ? 12 : 6, whole), 0);
  }
  return out;
}

}  // namespace secateur
