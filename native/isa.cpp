#include "isa.h"

#include <cstdlib>

#include "layer/spec.h"

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace secateur {
namespace {

std::vector<const KernelTable *> found() {
  std::vector<const KernelTable *> all;
#if defined(__x86_64__)
  __builtin_cpu_init();
#if defined(SECATEUR_WITH_AVX512FP16)  // the compiler knows it
  // AVX512-FP16 comes with all that the next table asks for.
  if (__builtin_cpu_supports("avx512fp16") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("bmi2")) {
    all.push_back(&table_avx512fp16);
  }
#endif
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    all.push_back(&table_avx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2")) {
    all.push_back(&table_avx2);
  }
  all.push_back(&table_baseline);
#elif defined(__aarch64__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDHP) all.push_back(&table_neonfp16);
  all.push_back(&table_neon);
#else
  all.push_back(&table_baseline);
#endif
  return all;
}

const KernelTable &named(const std::string &name, const std::string &asked) {
  std::string known;
  for (const KernelTable *each : tables()) {
    if (name == each->name) return *each;
    known += (known.empty() ? "" : ", ") + std::string(each->name);
  }
  throw Error(SECATEUR_INVALID,
              asked + ": it is not among the instruction sets that run here (" + known + ")");
}

}  // namespace

const std::vector<const KernelTable *> &tables() {
  static const std::vector<const KernelTable *> all = found();
  return all;
}

const KernelTable &table(const char *name) {
  if (name && *name) return named(name, "instruction set \"" + std::string(name) + "\"");
  static const std::string forced = [] {
    const char *set = std::getenv("SECATEUR_ISA");
    return std::string(set ? set : "");
  }();
  if (!forced.empty()) return named(forced, "SECATEUR_ISA=" + forced);
  return *tables().front();
}

const KernelTable &narrower(const KernelTable &than) {
  for (const KernelTable *each : tables()) {
    if (each->lanes < than.lanes) return *each;
  }
  return than;
}

}  // namespace secateur
