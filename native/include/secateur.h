/* The C interface of secateur's sparse kernels.
 *
 * Every call is safe from any thread. A call that can fail returns 0 or an error code;
 * secateur_last_error() then says, to the same thread, what was wrong.
 * No structure ever shrinks or changes its order within one SECATEUR_ABI.
 */
#ifndef SECATEUR_H
#define SECATEUR_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SECATEUR_ABI 1
#define SECATEUR_EXPORT __attribute__((visibility("default")))

enum { SECATEUR_OK = 0, SECATEUR_INVALID = 1, SECATEUR_DAMAGED = 2, SECATEUR_NO_MEMORY = 3 };

/* x is NCHW, or row-major tokens [tokens][features]. */
enum { SECATEUR_CONV = 0, SECATEUR_LINEAR = 1 };

/* CLIP is min(max(y, alpha), beta); GELU is the exact one, with erf. */
enum {
  SECATEUR_NONE = 0,
  SECATEUR_RELU = 1,
  SECATEUR_CLIP = 2,
  SECATEUR_GELU = 3,
  SECATEUR_SILU = 4,
  SECATEUR_HARDSWISH = 5
};

/* How the weights lie in memory; the layouts of a bundle (docs/formats). The weights are a matrix
 * [outputs][inputs * kernel[0] * kernel[1]] in row-major order.
 *   DENSE    values: every entry. index: empty. Exact zeros are skipped.
 *   BITMASK  values: the kept entries in order. index: one bit an entry, lowest bit first.
 *   CSR      values: the kept entries in order. index: one count a row, then one column a value,
 *            each as uint8, uint16 or int32: the smallest that holds the number of columns (counts)
 *            or the last column (columns). */
enum { SECATEUR_DENSE = 0, SECATEUR_BITMASK = 1, SECATEUR_CSR = 2 };

enum { SECATEUR_FLOAT32 = 0, SECATEUR_BFLOAT16 = 1, SECATEUR_FLOAT16 = 2 };

/*   LIST    one row at a time, a list of (where, weight): unstructured, sparse
 *   PANELS  four rows at a time, columns grouped by which of the four rows use them
 *   BLOCKS  4, 8 or 16 rows that use the same columns
 *   GEMV    bit masks and expanded weights, for LINEAR with few tokens
 *   HALF    LIST with float16 weights and activations, summed up in float32; an even number of
 *           vectors, and only where secateur_has_half says so
 *   DEPTHWISE all taps of depthwise kernels of 3 x 3 or 5 x 5, stride 1 or 2; zeros are not skipped */
enum {
  SECATEUR_LIST = 0,
  SECATEUR_PANELS = 1,
  SECATEUR_BLOCKS = 2,
  SECATEUR_GEMV = 3,
  SECATEUR_HALF = 4,
  SECATEUR_DEPTHWISE = 5
};

typedef struct {
  int32_t kind;
  int32_t outputs; /* rows of the matrix: output channels or features */
  int32_t inputs;  /* input channels of ONE group, or features */
  int32_t groups;
  int32_t kernel[2], stride[2], dilation[2]; /* height, width; 1 for LINEAR */
  int32_t pads[4];                           /* top, left, bottom, right; 0 for LINEAR */
  int32_t activation;
  float alpha, beta;
} secateur_spec;

typedef struct {
  int32_t layout;
  int32_t dtype; /* of values */
  const void *values;
  int64_t count; /* how many values */
  const uint8_t *index;
  int64_t index_bytes;
  const float *bias; /* outputs entries, or NULL */
} secateur_weights;

typedef struct {
  int32_t family;
  int32_t rows;    /* of a block; 4 for PANELS, 1 otherwise */
  int32_t vectors; /* width of a tile of positions, in vectors of the instruction set */
  int32_t columns; /* input channels that are packed at a time; 0: what fits the first cache */
} secateur_variant;

/* Queries [batch][queries][heads * size], keys [batch][keys][heads * size], values
 * [batch][keys][heads * value_size]. A mask is [mask_batch][mask_heads][queries][keys], where mask_batch
 * is batch or 1, and mask_heads is heads or 1. */
typedef struct {
  int64_t batch, queries, keys;
  int32_t heads, size, value_size;
  float scale;
  int64_t mask_batch;
  int32_t mask_heads;
} secateur_attention;

typedef struct secateur_layer secateur_layer;
typedef struct secateur_chain secateur_chain;
typedef struct secateur_pool secateur_pool;
typedef struct secateur_team secateur_team;

/* Runs task(user, i) for every i below count, in any order and on any threads, then returns. */
typedef void (*secateur_parallel)(void *context, void (*task)(void *user, size_t i), size_t count,
                                  void *user);

SECATEUR_EXPORT int secateur_abi(void);
SECATEUR_EXPORT const char *secateur_last_error(void);

/* The instruction set in use ("avx512", "avx2", "baseline", "neon"), and all that run here, best
 * first, separated by commas. The environment variable SECATEUR_ISA, read once, forces one; one
 * that does not exist or does not run here is an error of secateur_layer_create. */
SECATEUR_EXPORT const char *secateur_isa(void);
SECATEUR_EXPORT const char *secateur_isas(void);
/* Floats in a vector of an instruction set; NULL: the one in use; 0: unknown. */
SECATEUR_EXPORT int secateur_lanes(const char *isa);
/* Whether an instruction set multiplies float16 (family HALF); NULL: the one in use. */
SECATEUR_EXPORT int secateur_has_half(const char *isa);

/* Variants worth timing for a layer whose output has so many positions (oh * ow, or tokens) an
 * image, best guess first. Returns how many there are; writes at most capacity. */
SECATEUR_EXPORT int secateur_candidates(const secateur_spec *spec, int64_t positions,
                                        double density, const char *isa, secateur_variant *out,
                                        int capacity);

/* Checks and copies everything it is given. isa may be NULL. */
SECATEUR_EXPORT int secateur_layer_create(const secateur_spec *spec,
                                          const secateur_weights *weights,
                                          const secateur_variant *variant, const char *isa,
                                          secateur_layer **out);
SECATEUR_EXPORT void secateur_layer_destroy(secateur_layer *layer);

/* From now on a linear layer normalises every token of y over its outputs:
 * (y - mean) / sqrt(variance + epsilon) * scale + shift. Both have outputs entries; shift may be NULL.
 * To be called before the first run. */
SECATEUR_EXPORT int secateur_layer_normalise(secateur_layer *layer, const float *scale,
                                             const float *shift, float epsilon);

/* dims: CONV n, h, w of the input; LINEAR tokens, 1, 1.
 * out:  CONV n, h, w of the output; LINEAR the same as dims. */
SECATEUR_EXPORT int secateur_layer_shape(const secateur_layer *layer, const int64_t dims[3],
                                         int64_t out[3]);

/* y = activation(weights * x + bias + residual). residual has the shape of y, or is NULL; neither
 * may overlap y. parallel may be NULL: then all runs on the calling thread. threads is how many
 * threads to split for; below 1 counts as 1. */
SECATEUR_EXPORT int secateur_layer_run(const secateur_layer *layer, const float *x,
                                       const int64_t dims[3], const float *residual, float *y,
                                       secateur_parallel parallel, void *context, int threads);

/* Convolutions one after the other, each depthwise (family DEPTHWISE) or of single pixels (a kernel of
 * 1 x 1, stride 1, no padding). They run band by band: what one hands to the next never leaves the second
 * cache. The layers must outlive the chain. */
SECATEUR_EXPORT int secateur_chain_create(const secateur_layer *const *layers, int count,
                                          secateur_chain **out);
SECATEUR_EXPORT void secateur_chain_destroy(secateur_chain *chain);
/* As secateur_layer_shape and secateur_layer_run; the residual is added by the last layer. */
SECATEUR_EXPORT int secateur_chain_shape(const secateur_chain *chain, const int64_t dims[3],
                                         int64_t out[3]);
SECATEUR_EXPORT int secateur_chain_run(const secateur_chain *chain, const float *x,
                                       const int64_t dims[3], const float *residual, float *y,
                                       secateur_parallel parallel, void *context, int threads);

/* y[batch][queries][heads * value_size]: for every head the values, weighted with the softmax over keys
 * of scale * (query . key) + mask. mask and parallel may be NULL. isa may be NULL. */
SECATEUR_EXPORT int secateur_attention_run(const secateur_attention *attention, const char *isa,
                                           const float *q, const float *k, const float *v,
                                           const float *mask, float *y, secateur_parallel parallel,
                                           void *context, int threads);

SECATEUR_EXPORT int64_t secateur_layer_nonzeros(const secateur_layer *layer);
SECATEUR_EXPORT int64_t secateur_layer_bytes(const secateur_layer *layer);

/* A small pool of threads; the caller of a run works too, so threads = 1 starts none. */
SECATEUR_EXPORT secateur_pool *secateur_pool_create(int threads);
SECATEUR_EXPORT void secateur_pool_destroy(secateur_pool *pool);
SECATEUR_EXPORT int secateur_pool_threads(const secateur_pool *pool);
/* A secateur_parallel whose context is a pool. */
SECATEUR_EXPORT void secateur_pool_run(void *pool, void (*task)(void *user, size_t i), size_t count,
                                       void *user);

/* The threads of an OpenMP runtime that the program has already, by its GOMP_parallel, which LLVM's
 * and Intel's runtimes have, too. NULL if gomp_parallel is, or without memory. */
SECATEUR_EXPORT secateur_team *secateur_team_create(void *gomp_parallel, int threads);
SECATEUR_EXPORT void secateur_team_destroy(secateur_team *team);
/* A secateur_parallel whose context is a team. */
SECATEUR_EXPORT void secateur_team_run(void *team, void (*task)(void *user, size_t i), size_t count,
                                       void *user);

#ifdef __cplusplus
}
#endif
#endif
