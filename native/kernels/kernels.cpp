// All kernels of one instruction set. Compiled once for each, with SECATEUR_ISA as its name.
#include "attention.h"
#include "blocks.h"
#include "depthwise.h"
#include "gemv.h"
#include "half.h"
#include "list.h"
#include "norm.h"
#include "pack.h"
#include "panels.h"

#define SECATEUR_JOIN2(a, b) a##b
#define SECATEUR_JOIN(a, b) SECATEUR_JOIN2(a, b)
#define SECATEUR_TEXT2(a) #a
#define SECATEUR_TEXT(a) SECATEUR_TEXT2(a)

namespace secateur {

using namespace SECATEUR_ISA;

extern const KernelTable SECATEUR_JOIN(table_, SECATEUR_ISA) = {
    SECATEUR_TEXT(SECATEUR_ISA),
    kLanes,
    SECATEUR_REGISTERS,
    SECATEUR_ISA::list,
    SECATEUR_ISA::panels,
    SECATEUR_ISA::blocks,
    SECATEUR_ISA::depthwise,
#if SECATEUR_HAS_HALF
    SECATEUR_ISA::half_list,
    SECATEUR_ISA::halve,
#else
    nullptr,
    nullptr,
#endif
    SECATEUR_ISA::pack_plane,
    SECATEUR_ISA::pack_window,
    SECATEUR_ISA::pack_tokens,
    SECATEUR_ISA::unpack_tokens,
    SECATEUR_ISA::normalise,
    SECATEUR_ISA::attention,
    SECATEUR_ISA::attention_scratch,
    SECATEUR_ISA::gemv_f32,
    SECATEUR_ISA::gemv_bf16,
};

}  // namespace secateur
