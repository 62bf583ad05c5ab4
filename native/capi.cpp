// The C interface: no exception leaves it.
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "isa.h"
#include "layer/attention.h"
#include "layer/chain.h"
#include "layer/layer.h"
#include "secateur.h"

struct secateur_layer {
  secateur::Layer layer;
};

struct secateur_chain {
  secateur::Chain chain;
};

namespace {

thread_local std::string last_error;

// What call() gives, or what it throws as a code and a message.
template <typename Call>
int guarded(Call &&call) {
  try {
    call();
    return SECATEUR_OK;
  } catch (const secateur::Error &error) {
    last_error = error.what();
    return error.code;
  } catch (const std::bad_alloc &) {
    last_error = "there is not enough memory";
    return SECATEUR_NO_MEMORY;
  } catch (const std::exception &error) {
    last_error = error.what();
    return SECATEUR_INVALID;
  }
}

}  // namespace

int secateur_abi(void) { return SECATEUR_ABI; }

const char *secateur_last_error(void) { return last_error.c_str(); }

const char *secateur_isa(void) {
  const char *name = nullptr;
  guarded([&] { name = secateur::table(nullptr).name; });
  return name;
}

const char *secateur_isas(void) {
  static const std::string names = [] {
    std::string all;
    for (const auto *table : secateur::tables()) all += (all.empty() ? "" : ",") + std::string(table->name);
    return all;
  }();
  return names.c_str();
}

int secateur_lanes(const char *isa) {
  int lanes = 0;
  guarded([&] { lanes = secateur::table(isa).lanes; });
  return lanes;
}

int secateur_has_half(const char *isa) {
  int has = 0;
  guarded([&] { has = secateur::table(isa).half_list != nullptr; });
  return has;
}

int secateur_candidates(const secateur_spec *spec, int64_t positions, double density,
                        const char *isa, secateur_variant *out, int capacity) {
  int count = 0;
  const int code = guarded([&] {
    secateur::check(*spec);
    const auto all = secateur::candidates(*spec, positions, density, secateur::table(isa));
    count = static_cast<int>(all.size());
    for (int i = 0; i < count && i < capacity; ++i) out[i] = all[i];
  });
  return code ? 0 : count;
}

int secateur_layer_create(const secateur_spec *spec, const secateur_weights *weights,
                          const secateur_variant *variant, const char *isa, secateur_layer **out) {
  return guarded([&] {
    *out = nullptr;
    *out = new secateur_layer{secateur::Layer(*spec, *weights, *variant, secateur::table(isa))};
  });
}

void secateur_layer_destroy(secateur_layer *layer) { delete layer; }

int secateur_layer_normalise(secateur_layer *layer, const float *scale, const float *shift,
                             float epsilon) {
  return guarded([&] { layer->layer.normalise(scale, shift, epsilon); });
}

int secateur_layer_shape(const secateur_layer *layer, const int64_t dims[3], int64_t out[3]) {
  return guarded([&] { layer->layer.shape(dims, out); });
}

int secateur_layer_run(const secateur_layer *layer, const float *x, const int64_t dims[3],
                       const float *residual, float *y, secateur_parallel parallel, void *context,
                       int threads) {
  return guarded([&] { layer->layer.run(x, dims, residual, y, {parallel, context, threads}); });
}

int secateur_chain_create(const secateur_layer *const *layers, int count, secateur_chain **out) {
  return guarded([&] {
    *out = nullptr;
    std::vector<const secateur::Layer *> all;
    for (int i = 0; i < count; ++i) all.push_back(&layers[i]->layer);
    *out = new secateur_chain{secateur::Chain(std::move(all))};
  });
}

void secateur_chain_destroy(secateur_chain *chain) { delete chain; }

int secateur_chain_shape(const secateur_chain *chain, const int64_t dims[3], int64_t out[3]) {
  return guarded([&] { chain->chain.shape(dims, out); });
}

int secateur_chain_run(const secateur_chain *chain, const float *x, const int64_t dims[3],
                       const float *residual, float *y, secateur_parallel parallel, void *context,
                       int threads) {
  return guarded([&] { chain->chain.run(x, dims, residual, y, {parallel, context, threads}); });
}

int secateur_attention_run(const secateur_attention *attention, const char *isa, const float *q,
                           const float *k, const float *v, const float *mask, float *y,
                           secateur_parallel parallel, void *context, int threads) {
  return guarded([&] {
    secateur::attend(*attention, {q, k, v, mask, y}, secateur::table(isa),
                     {parallel, context, threads});
  });
}

int64_t secateur_layer_nonzeros(const secateur_layer *layer) { return layer->layer.nonzeros(); }
int64_t secateur_layer_bytes(const secateur_layer *layer) { return layer->layer.bytes(); }
