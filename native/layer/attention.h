// Attention over batches and heads.
#pragma once

#include "../isa.h"
#include "spec.h"

namespace secateur {

struct AttentionArrays {
  const float *q, *k, *v, *mask;
  float *y;
};

// Throws Error if the sizes make no sense.
void attend(const secateur_attention &sizes, const AttentionArrays &arrays, const KernelTable &table,
            const Parallel &asked);

}  // namespace secateur
