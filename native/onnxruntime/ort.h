// The part of ONNX Runtime's C interface that our operators use, written down from its facts.
//
// The interface is one table of function pointers. ONNX Runtime only ever adds to its end (and
// asserts so in its own build), so a slot keeps its number for ever and the slots that we do not
// use need no names. The number of a slot is stated beside it and checked by the compiler.
#pragma once

#include <cstddef>
#include <cstdint>

namespace secateur::ort {

// Objects that only ONNX Runtime looks into.
struct Status;
struct Value;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct TensorInfo;
struct KeyValuePairs;
struct ShapeInferContext;

// Only the values that we name. The types are plain integers so that a value that is new to us is
// still a value.
using ErrorCode = int32_t;
enum : ErrorCode { FAIL = 1, INVALID_ARGUMENT = 2, INVALID_GRAPH = 10 };

using ElementType = int32_t;
enum : ElementType { UNDEFINED = 0, FLOAT = 1, UINT8 = 2, FLOAT16 = 10, BFLOAT16 = 16 };

using Characteristic = int32_t;
enum : Characteristic { REQUIRED = 0, OPTIONAL = 1 };

// A table of the version in which the last function below that we cannot do without appeared.
constexpr uint32_t VERSION = 17;
// The version that added KernelInfo_GetConfigEntries, which we use where it exists.
constexpr int VERSION_OF_CONFIG_ENTRIES = 24;

struct Api {
  Status *(*CreateStatus)(ErrorCode code, const char *message);  // 0
  void *unused1[1];
  const char *(*GetErrorMessage)(const Status *status);  // 2
  void *unused3[23];
  Status *(*CreateCustomOpDomain)(const char *domain, CustomOpDomain **out);           // 26
  Status *(*CustomOpDomain_Add)(CustomOpDomain *domain, const struct CustomOp *op);    // 27
  Status *(*AddCustomOpDomain)(SessionOptions *options, CustomOpDomain *domain);       // 28
  void *unused29[22];
  Status *(*GetTensorMutableData)(Value *value, void **out);  // 51
  void *unused52[8];
  Status *(*GetTensorElementType)(const TensorInfo *info, ElementType *out);           // 60
  Status *(*GetDimensionsCount)(const TensorInfo *info, size_t *out);                  // 61
  Status *(*GetDimensions)(const TensorInfo *info, int64_t *dims, size_t count);       // 62
  void *unused63[2];
  Status *(*GetTensorTypeAndShape)(const Value *value, TensorInfo **out);  // 65
  void *unused66[19];
  Status *(*KernelInfoGetAttribute_float)(const KernelInfo *info, const char *name,
                                          float *out);  // 85
  Status *(*KernelInfoGetAttribute_int64)(const KernelInfo *info, const char *name,
                                          int64_t *out);  // 86
  void *unused87[1];
  Status *(*KernelContext_GetInputCount)(const KernelContext *context, size_t *out);  // 88
  void *unused89[1];
  Status *(*KernelContext_GetInput)(const KernelContext *context, size_t index,
                                    const Value **out);  // 90
  Status *(*KernelContext_GetOutput)(KernelContext *context, size_t index, const int64_t *dims,
                                     size_t count, Value **out);  // 91
  void *unused92[1];
  void (*ReleaseStatus)(Status *status);  // 93
  void *unused94[5];
  void (*ReleaseTensorTypeAndShapeInfo)(TensorInfo *info);  // 99
  void *unused100[30];
  Status *(*AddSessionConfigEntry)(SessionOptions *options, const char *key,
                                   const char *value);  // 130
  void *unused131[32];
  // With out null, size becomes the number of entries.
  Status *(*KernelInfoGetAttributeArray_int64)(const KernelInfo *info, const char *name,
                                               int64_t *out, size_t *size);  // 163
  void *unused164[66];
  Status *(*KernelInfo_GetInputCount)(const KernelInfo *info, size_t *out);  // 230
  void *unused231[1];
  // Names: with out null, size becomes the length with the final zero.
  Status *(*KernelInfo_GetInputName)(const KernelInfo *info, size_t index, char *out,
                                     size_t *size);  // 232
  void *unused233[4];
  Status *(*HasSessionConfigEntry)(const SessionOptions *options, const char *key,
                                   int *out);  // 237
  void *unused238[6];
  Status *(*KernelInfo_GetNodeName)(const KernelInfo *info, char *out, size_t *size);  // 244
  void *unused245[4];
  // The value belongs to the session.
  Status *(*KernelInfoGetConstantInput_tensor)(const KernelInfo *info, size_t index,
                                               int *is_constant, const Value **out);  // 249
  void *unused250[24];
  // batches = 0: one call at a time is handed to whichever thread is free.
  Status *(*KernelContext_ParallelFor)(const KernelContext *context, void (*task)(void *, size_t),
                                       size_t total, size_t batches, void *user);  // 274
  void *unused275[22];
  const char *(*GetKeyValue)(const KeyValuePairs *pairs, const char *key);  // 297
  void *unused298[2];
  void (*ReleaseKeyValuePairs)(KeyValuePairs *pairs);  // 300
  void *unused301[90];
  Status *(*KernelInfo_GetConfigEntries)(const KernelInfo *info, KeyValuePairs **out);  // 391
};

#define SECATEUR_SLOT(number, name)                              \
  static_assert(offsetof(Api, name) == (number) * sizeof(void *), \
                #name " is not in the slot of its number")
SECATEUR_SLOT(0, CreateStatus);
SECATEUR_SLOT(2, GetErrorMessage);
SECATEUR_SLOT(26, CreateCustomOpDomain);
SECATEUR_SLOT(27, CustomOpDomain_Add);
SECATEUR_SLOT(28, AddCustomOpDomain);
SECATEUR_SLOT(51, GetTensorMutableData);
SECATEUR_SLOT(60, GetTensorElementType);
SECATEUR_SLOT(61, GetDimensionsCount);
SECATEUR_SLOT(62, GetDimensions);
SECATEUR_SLOT(65, GetTensorTypeAndShape);
SECATEUR_SLOT(85, KernelInfoGetAttribute_float);
SECATEUR_SLOT(86, KernelInfoGetAttribute_int64);
SECATEUR_SLOT(88, KernelContext_GetInputCount);
SECATEUR_SLOT(90, KernelContext_GetInput);
SECATEUR_SLOT(91, KernelContext_GetOutput);
SECATEUR_SLOT(93, ReleaseStatus);
SECATEUR_SLOT(99, ReleaseTensorTypeAndShapeInfo);
SECATEUR_SLOT(130, AddSessionConfigEntry);
SECATEUR_SLOT(163, KernelInfoGetAttributeArray_int64);
SECATEUR_SLOT(230, KernelInfo_GetInputCount);
SECATEUR_SLOT(232, KernelInfo_GetInputName);
SECATEUR_SLOT(237, HasSessionConfigEntry);
SECATEUR_SLOT(244, KernelInfo_GetNodeName);
SECATEUR_SLOT(249, KernelInfoGetConstantInput_tensor);
SECATEUR_SLOT(274, KernelContext_ParallelFor);
SECATEUR_SLOT(297, GetKeyValue);
SECATEUR_SLOT(300, ReleaseKeyValuePairs);
SECATEUR_SLOT(391, KernelInfo_GetConfigEntries);
#undef SECATEUR_SLOT

struct ApiBase {
  const Api *(*GetApi)(uint32_t version);  // null where the version is too new
  const char *(*GetVersionString)();
};

// What ONNX Runtime asks of an operator. It reads no member that came after `version`.
struct CustomOp {
  uint32_t version;
  void *(*CreateKernel)(const CustomOp *, const Api *, const KernelInfo *);
  const char *(*GetName)(const CustomOp *);
  const char *(*GetExecutionProviderType)(const CustomOp *);
  ElementType (*GetInputType)(const CustomOp *, size_t index);
  size_t (*GetInputTypeCount)(const CustomOp *);
  ElementType (*GetOutputType)(const CustomOp *, size_t index);
  size_t (*GetOutputTypeCount)(const CustomOp *);
  void (*KernelCompute)(void *kernel, KernelContext *);
  void (*KernelDestroy)(void *kernel);
  Characteristic (*GetInputCharacteristic)(const CustomOp *, size_t index);
  Characteristic (*GetOutputCharacteristic)(const CustomOp *, size_t index);
  int32_t (*GetInputMemoryType)(const CustomOp *, size_t index);
  int (*GetVariadicInputMinArity)(const CustomOp *);
  int (*GetVariadicInputHomogeneity)(const CustomOp *);
  int (*GetVariadicOutputMinArity)(const CustomOp *);
  int (*GetVariadicOutputHomogeneity)(const CustomOp *);
  // These two, since version 16, can fail; then the plain pair above is not called.
  Status *(*CreateKernelV2)(const CustomOp *, const Api *, const KernelInfo *, void **kernel);
  Status *(*KernelComputeV2)(void *kernel, KernelContext *);
  Status *(*InferOutputShape)(const CustomOp *, ShapeInferContext *);
  int (*GetStartVersion)(const CustomOp *);
  int (*GetEndVersion)(const CustomOp *);
  size_t (*GetMayInplace)(int **input, int **output);
  void (*ReleaseMayInplace)(int *input, int *output);
  size_t (*GetAliasMap)(int **input, int **output);
  void (*ReleaseAliasMap)(int *input, int *output);
};
static_assert(sizeof(CustomOp) == 26 * sizeof(void *), "an operator has 26 members");

}  // namespace secateur::ort
