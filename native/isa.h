// Which kernels run here.
#pragma once

#include <string>
#include <vector>

#include "kernels/table.h"

namespace secateur {

// Those that this machine runs, best first.
const std::vector<const KernelTable *> &tables();

// The table of a name; the one in use for null or "". Throws Error if it does not run here, or if
// SECATEUR_ISA names one that does not.
const KernelTable &table(const char *name);

// The next table with shorter vectors that runs here, or the same one: for rows that would leave
// most of a vector idle.
const KernelTable &narrower(const KernelTable &than);

}  // namespace secateur
