#include <omp.h>

#include "batch_norm_act.h"
#include "bindings.h"
#include "channel_aggregation_ffn.h"
#include "cross_covariance.h"
#include "dwconv_layer_norm.h"
#include "feature_decompose.h"
#include "gated_recursion.h"
#include "global_filter.h"
#include "instruction_sets.h"
#include "layer_norm_2d.h"
#include "mlp.h"
#include "moga_gate.h"
#include "multi_order_dwconv.h"
#include "pointwise.h"
#include "relative_attention.h"
#include "runtime.h"
#include "scaled_residual.h"
#include "shift_split_attention.h"
#include "split_cascade.h"

namespace vops {

void raise(Error error) {
  if (error == kOutOfMemory) throw std::bad_alloc();
  throw std::runtime_error(error);
}

static PyObject* thread_count = nullptr;  // a function

// OpenMP keeps a number of threads for every thread that starts some; PyTorch tells it in those that have asked.
void prepare() {
  static thread_local bool told = false;
  if (told || !thread_count) return;
  PyObject* count = PyObject_CallNoArgs(thread_count);
  if (!count) throw PythonError();
  const long threads = PyLong_AsLong(count);
  Py_DECREF(count);
  omp_set_num_threads((int)converted(threads));
  told = true;
}

VOPS_CPU_OP(BatchNormActOps, batch_norm_act)
VOPS_CPU_OP(ChannelAggregationFfnOps, channel_aggregation_ffn)
VOPS_CPU_OP(CrossCovarianceOps, cross_covariance)
VOPS_CPU_OP(DwConvOps, dwconv)
VOPS_CPU_OP(DwConvLayerNormOps, dwconv_layer_norm)
VOPS_CPU_OP(FeatureDecomposeOps, feature_decompose)
VOPS_CPU_OP(GatedRecursionOps, gated_recursion)
VOPS_CPU_OP(GlobalFilterOps, global_filter)
VOPS_CPU_OP(LayerNorm2dOps, layer_norm_2d)
VOPS_CPU_OP(MlpOps, mlp)
VOPS_CPU_OP(MogaGateOps, moga_gate)
VOPS_CPU_OP(MultiOrderDwConvOps, multi_order_dwconv)
VOPS_CPU_OP(PointwiseOps, pointwise)
VOPS_CPU_OP(RelativeAttentionOps, relative_attention)
VOPS_CPU_OP(ScaledResidualOps, scaled_residual)
VOPS_CPU_OP(ShiftSplitAttentionOps, shift_split_attention)
VOPS_CPU_OP(SplitCascadeOps, split_cascade)

// (combine, activation, z, kept, gamma, path_scale)
static void read(Arguments& given, Ending* end) {
  Arguments each = items(given.next());
  read(each, &end->combine);
  read(each, &end->act);
  for (Tensor4* t : {&end->z, &end->kept, &end->gamma, &end->path_scale}) read(each, t);
  each.end();
}

namespace {

using Tensors = std::vector<Tensor4>;
using Sizes = std::array<int64_t, 2>;
template <size_t N>
using TensorArray = std::array<Tensor4, N>;

ChannelAggregationFfn channel_aggregation_ffn_of(const TensorArray<9>& t) {
  return {t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8]};
}

BatchNormCoefficients batch_norm_of(const TensorArray<3>& t) { return {t[0], t[1], t[2]}; }

// with_crew(function, *arguments). Python, too, runs on the thread that called: the others only ever run kernels.
PyObject* run_with_crew(PyObject*, PyObject* const* given, Py_ssize_t count) {
  struct Call {
    PyObject* const* given;
    Py_ssize_t count;
    PyObject* result;
  } call = {given, count, nullptr};
  if (count == 0) return PyErr_Format(PyExc_TypeError, "with_crew takes a function");
  if (!guarded([] { return prepare(), Py_None; })) return nullptr;
  with_crew(
      [](void* context) {
        Call& c = *(Call*)context;
        c.result = PyObject_Vectorcall(c.given[0], c.given + 1, c.count - 1, nullptr);
      },
      &call);
  return call.result;
}
PyObject* follow_thread_count(PyObject*, PyObject* count) {
  Py_INCREF(count);
  thread_count = count;
  Py_RETURN_NONE;
}
PyObject* reads_tensors(PyObject*, PyObject* tensor) {
  Tensor4 t;
  if (read_tensor(tensor, kByDimensions, &t)) Py_RETURN_TRUE;
  PyErr_Clear();
  Py_RETURN_FALSE;
}
PyMethodDef reads_method = {"reads_tensors", reads_tensors, METH_O, nullptr};
PyMethodDef follow_method = {"follow_thread_count", follow_thread_count, METH_O, nullptr};
PyMethodDef with_crew_method = {"with_crew", (PyCFunction)(AnyFunction)run_with_crew, METH_FASTCALL, nullptr};

void define_depthwise(PyObject* m) {
  define(m, "dwconv", cpu_dwconv().forward);
  define(m, "dwconv_backward_activation", cpu_dwconv().backward_activation);
  define(m, "dwconv_backward_input", cpu_dwconv().backward_input);
  define(m, "dwconv_backward_weight", cpu_dwconv().backward_weight);

  define(
      m, "multi_order_dwconv",
      +[](Tensor4 x, TensorArray<3> w, TensorArray<3> b, Tensor4 y, std::array<DwConv, 3> convs) {
        return cpu_multi_order_dwconv().forward(x, multi_order(convs, w, b), y);
      });
  define(
      m, "multi_order_dwconv_backward",
      +[](Tensor4 dy, Tensor4 x, TensorArray<3> w, TensorArray<3> b, Tensor4 dx, TensorArray<3> dw, TensorArray<3> db,
          std::array<DwConv, 3> convs) {
        const MultiOrderDwConvGrads grads = {dx, {dw[0], dw[1], dw[2]}, {db[0], db[1], db[2]}};
        return cpu_multi_order_dwconv().backward(dy, x, multi_order(convs, w, b), grads);
      });

  define(m, "dwconv_layer_norm", cpu_dwconv_layer_norm().forward);
  define(
      m, "dwconv_layer_norm_backward",
      +[](Tensor4 dy, Tensor4 x, Tensor4 w, Tensor4 b, Tensor4 ln_w, Tensor4 statistics, Tensor4 dx, Tensor4 dw,
          Tensor4 db, Tensor4 dln_w, Tensor4 dln_b, DwConv conv) {
        return cpu_dwconv_layer_norm().backward(dy, x, w, b, ln_w, statistics, {dx, dw, db, dln_w, dln_b}, conv);
      });

  define(
      m, "split_cascade", +[](Tensor4 x, Tensors w, Tensors b, Tensor4 y, DwConv conv) {
        return cpu_split_cascade().forward(x, {conv, (int64_t)w.size(), w.data(), b.data()}, y);
      });
  define(
      m, "split_cascade_backward",
      +[](Tensor4 dy, Tensor4 x, Tensors w, Tensors b, Tensor4 dx, Tensors dw, Tensors db, DwConv conv) {
        const SplitCascade p = {conv, (int64_t)w.size(), w.data(), b.data()};
        return cpu_split_cascade().backward(dy, x, p, {dx, dw.data(), db.data()});
      });
}

void define_moganet(PyObject* m) {
  define(m, "moga_gate", cpu_moga_gate().forward);
  define(m, "moga_gate_backward", cpu_moga_gate().backward);
  define(m, "image_means", cpu_feature_decompose().means);
  define(m, "feature_decompose", cpu_feature_decompose().forward);
  define(m, "feature_decompose_backward", cpu_feature_decompose().backward);

  define(m, "channel_aggregation", cpu_channel_aggregation_ffn().forward);
  define(
      m, "channel_aggregation_backward",
      +[](Tensor4 f, Tensor4 w, Tensor4 b, Tensor4 v, Tensor4 scores, Tensor4 dd, Tensor4 dh, Tensor4 h, Tensor4 d,
          Tensor4 df, Tensor4 dw, Tensor4 db, Tensor4 dv, Tensor4 dc, Tensor4 df_sums, int64_t first, DwConv conv) {
        const ChannelAggregationFfnGrads grads = {df, dw, db, dv, dc, df_sums};
        return cpu_channel_aggregation_ffn().backward(f, w, b, v, scores, dd, dh, h, d, grads, first, conv);
      });
  define(
      m, "channel_aggregation_ffn",
      +[](TensorArray<9> arguments, Sizes chunk, Tensor4 f, Tensor4 h, Tensor4 scores, Tensor4 y) {
        return channel_aggregation_ffn(channel_aggregation_ffn_of(arguments), {chunk[0], chunk[1]}, f, h, scores, y);
      });
  define(
      m, "channel_aggregation_ffn_backward",
      +[](TensorArray<9> arguments, Sizes chunk, Tensor4 dy, Tensor4 scores, Tensor4 f, bool kept,
          TensorArray<3> buffers, Tensor4 dx, TensorArray<7> t) {
        const auto& [h, dh, df] = buffers;
        return channel_aggregation_ffn_backward(channel_aggregation_ffn_of(arguments), {chunk[0], chunk[1]}, dy, scores,
                                                f, kept, {h, dh, df}, dx, {t[0], t[1], t[2], t[3], t[4], t[5], t[6]});
      });
}

void define_hornet(PyObject* m) {
  define(m, "gate", cpu_gated_recursion().gate);
  define(m, "gate_backward", cpu_gated_recursion().gate_backward);
  define(m, "channel_sums", cpu_gated_recursion().channel_sums);
  define(m, "global_filter", cpu_global_filter().forward);
  define(m, "global_filter_backward", cpu_global_filter().backward);
  define(m, "layer_norm_2d", cpu_layer_norm_2d().forward);
  define(m, "layer_norm_2d_backward", cpu_layer_norm_2d().backward);
}

void define_attention(PyObject* m) {
  define(m, "gram", cpu_cross_covariance().gram);
  define(m, "cosine_softmax", cpu_cross_covariance().softmax);
  define(m, "cosine_softmax_backward", cpu_cross_covariance().softmax_backward);
  define(m, "apply_by_head", cpu_cross_covariance().apply);
  define(m, "sum_tokens", cpu_cross_covariance().sum_tokens);

  define(m, "relative_attention", cpu_relative_attention().forward);
  define(m, "relative_attention_backward", cpu_relative_attention().backward);

  define(m, "edge_sums", cpu_shift_split_attention().edge_sums);
  define(m, "pool", cpu_shift_split_attention().pool);
  define(m, "pool_linear", cpu_shift_split_attention().pool_linear);
  define(m, "branch_weights", cpu_shift_split_attention().branch_weights);
  define(m, "branch_weights_backward", cpu_shift_split_attention().branch_weights_backward);
  define(m, "weigh", cpu_shift_split_attention().weigh);
  define(
      m, "linear_weigh_linear",
      +[](Tensor4 x, Tensor4 mlp1, Tensor4 weights, Tensor4 offset, Tensor4 mlp2, Tensor4 bias, Tensor4 branches,
          Tensor4 weighed, Tensor4 y) {
        const LinearWeighLinear t = {x, mlp1, weights, offset, mlp2, bias, branches, weighed};
        return cpu_shift_split_attention().linear_weigh_linear(t, y);
      });
  define(m, "weigh_backward_weights", cpu_shift_split_attention().weigh_backward_weights);
  define(m, "weigh_backward_input", cpu_shift_split_attention().weigh_backward_input);
}

void define_batch_norm(PyObject* m) {
  define(m, "batch_norm_prepare", cpu_batch_norm_act().prepare);
  define(
      m, "batch_norm_act", +[](Tensor4 x, TensorArray<3> c, Tensor4 y, Tensor4 means, Activation act) {
        return cpu_batch_norm_act().forward(x, batch_norm_of(c), y, means, act);
      });
  define(
      m, "batch_norm_act_backward_sums",
      +[](Tensor4 dy, Tensor4 x, TensorArray<3> c, Tensor4 y, TensorArray<3> ends, int64_t count, Activation act) {
        const BatchNormEnds given = {ends[0], ends[1], ends[2], count};
        return cpu_batch_norm_act().backward_sums(dy, x, batch_norm_of(c), y, given, act);
      });
  define(
      m, "batch_norm_act_backward_images",
      +[](Tensor4 dy, Tensor4 x, TensorArray<3> c, Tensor4 y, Tensor4 sums, Activation act) {
        return cpu_batch_norm_act().backward_images(dy, x, batch_norm_of(c), y, sums, act);
      });
  define(
      m, "batch_norm_finish", +[](Tensor4 sums, TensorArray<3> c, TensorArray<3> ends, int64_t count) {
        return cpu_batch_norm_act().finish(sums, batch_norm_of(c), {ends[0], ends[1], ends[2], count});
      });
  define(
      m, "batch_norm_act_backward_input",
      +[](Tensor4 dy, Tensor4 x, TensorArray<3> c, Tensor4 line, Tensor4 plus, Tensor4 dx, Activation act) {
        return cpu_batch_norm_act().backward_input(dy, x, batch_norm_of(c), line, plus, dx, act);
      });
}

void fill(PyObject* m) {
  if (PyModule_AddStringConstant(m, "isa", instruction_set_name())) throw PythonError();
  add_function(m, &follow_method, nullptr);
  add_function(m, &reads_method, nullptr);
  add_function(m, &with_crew_method, nullptr);
  define(m, "pointwise", cpu_pointwise().forward);
  define(m, "pointwise_backward_weight", cpu_pointwise().backward_weight);
  define(m, "activate", cpu_mlp().activate);
  define(m, "activate_backward", cpu_mlp().activate_backward);
  define(m, "scaled_residual", cpu_scaled_residual().forward);
  define(m, "scaled_residual_backward", cpu_scaled_residual().backward);
  define_depthwise(m);
  define_moganet(m);
  define_hornet(m);
  define_attention(m);
  define_batch_norm(m);
}

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace vops

PyMODINIT_FUNC PyInit__cpu() { return vops::make_module(&vops::module, vops::fill); }
