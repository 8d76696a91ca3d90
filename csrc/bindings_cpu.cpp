#include <omp.h>

#include <exception>
#include <new>
#include <stdexcept>
#include <vector>

#include "bindings.h"
#include "runtime.h"

using namespace vops;

namespace {

std::vector<Tensor4> tensors(const py::sequence& views) {
  std::vector<Tensor4> all;
  for (const py::handle view : views) all.push_back(tensor(view));
  return all;
}

ChannelAggregationFfn channel_aggregation_ffn_of(const py::sequence& views) {
  const std::vector<Tensor4> t = tensors(views);
  return {t.at(0), t.at(1), t.at(2), t.at(3), t.at(4), t.at(5), t.at(6), t.at(7), t.at(8)};
}

ChannelAggregationFfnChunks chunks_of(const py::tuple& sizes) {
  return {py::cast<int64_t>(sizes[0]), py::cast<int64_t>(sizes[1])};
}

PyObject* thread_count = nullptr;  // a function

// OpenMP keeps a number of threads for every thread that starts some; PyTorch tells it in those that have asked.
void follow_thread_count() {
  static thread_local bool told = false;
  if (told || !thread_count) return;
  omp_set_num_threads(py::cast<int>(py::handle(thread_count)()));
  told = true;
}

template <class F>
void run(const F& f) {
  follow_thread_count();
  const Error error = without_gil(f);
  if (error == kOutOfMemory) throw std::bad_alloc();
  if (error) throw std::runtime_error(error);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.attr("isa") = cpu_kernels().isa;

  m.def("follow_thread_count", [](py::function count) { thread_count = count.release().ptr(); });

  // Python, too, runs on the thread that called: the others only ever run kernels.
  m.def("with_crew", [](const py::function& function, const py::args& args) {
    struct Call {
      const py::function& function;
      const py::args& args;
      py::object result;
      std::exception_ptr error;  // which may not leave a parallel region
    } call = {function, args, {}, nullptr};
    follow_thread_count();
    with_crew(
        [](void* context) {
          Call& c = *(Call*)context;
          try {
            c.result = c.function(*c.args);
          } catch (...) {
            c.error = std::current_exception();
          }
        },
        &call);
    if (call.error) std::rethrow_exception(call.error);
    return call.result;
  });

  m.def("dwconv", [](py::handle x, py::handle w, py::handle b, py::handle y, const py::tuple& f, int activation) {
    const Tensor4 tx = tensor(x), tw = tensor(w), tb = tensor(b), ty = tensor(y);
    const DwConv c = conv(f);
    run([&] { return cpu_kernels().dwconv->forward(tx, tw, tb, ty, c, Activation(activation)); });
  });
  m.def("dwconv_backward_activation", [](py::handle dy, py::handle x, py::handle w, py::handle b, py::handle du,
                                         const py::tuple& f, int activation) {
    const Tensor4 tdy = tensor(dy), tx = tensor(x), tw = tensor(w), tb = tensor(b), tdu = tensor(du);
    const DwConv c = conv(f);
    run([&] { return cpu_kernels().dwconv->backward_activation(tdy, tx, tw, tb, tdu, c, Activation(activation)); });
  });
  m.def("dwconv_backward_input", [](py::handle dy, py::handle w, py::handle dx, const py::tuple& f) {
    const Tensor4 tdy = tensor(dy), tw = tensor(w), tdx = tensor(dx);
    const DwConv c = conv(f);
    run([&] { return cpu_kernels().dwconv->backward_input(tdy, tw, tdx, c); });
  });
  m.def("dwconv_backward_weight", [](py::handle dy, py::handle x, py::handle dw, py::handle db, const py::tuple& f) {
    const Tensor4 tdy = tensor(dy), tx = tensor(x), tdw = tensor(dw), tdb = tensor(db);
    const DwConv c = conv(f);
    run([&] { return cpu_kernels().dwconv->backward_weight(tdy, tx, tdw, tdb, c); });
  });

  m.def("multi_order_dwconv",
        [](py::handle x, const py::tuple& weights, const py::tuple& biases, py::handle y, const py::tuple& convs) {
          const Tensor4 tx = tensor(x), ty = tensor(y);
          const MultiOrderDwConv p = multi_order(convs, weights, biases);
          run([&] { return cpu_kernels().multi_order_dwconv->forward(tx, p, ty); });
        });
  m.def("multi_order_dwconv_backward",
        [](py::handle dy, py::handle x, const py::tuple& weights, const py::tuple& biases, py::handle dx,
           const py::tuple& dweights, const py::tuple& dbiases, const py::tuple& convs) {
          const Tensor4 tdy = tensor(dy), tx = tensor(x);
          const MultiOrderDwConv p = multi_order(convs, weights, biases);
          const MultiOrderDwConvGrads grads = multi_order_grads(dx, dweights, dbiases);
          run([&] { return cpu_kernels().multi_order_dwconv->backward(tdy, tx, p, grads); });
        });

  m.def("layer_norm_2d", [](py::handle x, py::handle w, py::handle b, py::handle y, double eps) {
    const Tensor4 tx = tensor(x), tw = tensor(w), tb = tensor(b), ty = tensor(y);
    run([&] { return cpu_kernels().layer_norm_2d->forward(tx, tw, tb, ty, eps); });
  });
  m.def("layer_norm_2d_backward",
        [](py::handle dy, py::handle x, py::handle w, py::handle dx, py::handle dw, py::handle db, double eps) {
          const Tensor4 tdy = tensor(dy), tx = tensor(x), tw = tensor(w), tdx = tensor(dx), tdw = tensor(dw),
                        tdb = tensor(db);
          run([&] { return cpu_kernels().layer_norm_2d->backward(tdy, tx, tw, tdx, tdw, tdb, eps); });
        });

  m.def("gate", [](py::handle u, py::handle b, py::handle q, py::handle p) {
    const Tensor4 tu = tensor(u), tb = tensor(b), tq = tensor(q), tp = tensor(p);
    run([&] { return cpu_kernels().gated_recursion->gate(tu, tb, tq, tp); });
  });
  m.def("gate_backward",
        [](py::handle dp, py::handle u, py::handle b, py::handle q, py::handle du, py::handle dq, py::handle db) {
          const Tensor4 tdp = tensor(dp), tu = tensor(u), tb = tensor(b), tq = tensor(q);
          const Tensor4 tdu = tensor(du), tdq = tensor(dq), tdb = tensor(db);
          run([&] { return cpu_kernels().gated_recursion->gate_backward(tdp, tu, tb, tq, tdu, tdq, tdb); });
        });
  m.def("channel_sums", [](py::handle t, py::handle sums) {
    const Tensor4 tt = tensor(t), tsums = tensor(sums);
    run([&] { return cpu_kernels().gated_recursion->channel_sums(tt, tsums); });
  });

  m.def("dwconv_layer_norm", [](py::handle x, py::handle w, py::handle b, py::handle ln_w, py::handle ln_b,
                                py::handle y, py::handle statistics, const py::tuple& f, double eps) {
    const Tensor4 tx = tensor(x), tw = tensor(w), tb = tensor(b), tln_w = tensor(ln_w), tln_b = tensor(ln_b);
    const Tensor4 ty = tensor(y), ts = tensor(statistics);
    const DwConv c = conv(f);
    run([&] { return cpu_kernels().dwconv_layer_norm->forward(tx, tw, tb, tln_w, tln_b, ty, ts, c, eps); });
  });
  m.def("dwconv_layer_norm_backward",
        [](py::handle dy, py::handle x, py::handle w, py::handle b, py::handle ln_w, py::handle statistics,
           py::handle dx, py::handle dw, py::handle db, py::handle dln_w, py::handle dln_b, const py::tuple& f) {
          const Tensor4 tdy = tensor(dy), tx = tensor(x), tw = tensor(w), tb = tensor(b), tln_w = tensor(ln_w),
                        ts = tensor(statistics);
          const DwConvLayerNormGrads grads = {tensor(dx), tensor(dw), tensor(db), tensor(dln_w), tensor(dln_b)};
          const DwConv c = conv(f);
          run([&] { return cpu_kernels().dwconv_layer_norm->backward(tdy, tx, tw, tb, tln_w, ts, grads, c); });
        });

  m.def("split_cascade",
        [](py::handle x, const py::sequence& weights, const py::sequence& biases, py::handle y, const py::tuple& f) {
          const Tensor4 tx = tensor(x), ty = tensor(y);
          const std::vector<Tensor4> tw = tensors(weights), tb = tensors(biases);
          const SplitCascade p = {conv(f), (int64_t)tw.size(), tw.data(), tb.data()};
          run([&] { return cpu_kernels().split_cascade->forward(tx, p, ty); });
        });
  m.def("split_cascade_backward",
        [](py::handle dy, py::handle x, const py::sequence& weights, const py::sequence& biases, py::handle dx,
           const py::sequence& dweights, const py::sequence& dbiases, const py::tuple& f) {
          const Tensor4 tdy = tensor(dy), tx = tensor(x);
          const std::vector<Tensor4> tw = tensors(weights), tb = tensors(biases), tdw = tensors(dweights),
                                     tdb = tensors(dbiases);
          const SplitCascade p = {conv(f), (int64_t)tw.size(), tw.data(), tb.data()};
          const SplitCascadeGrads grads = {tensor(dx), tdw.data(), tdb.data()};
          run([&] { return cpu_kernels().split_cascade->backward(tdy, tx, p, grads); });
        });

  m.def("gram", [](py::handle a, py::handle b, py::handle u, py::handle v, py::handle gram, py::handle norms) {
    const Tensor4 ta = tensor(a), tb = tensor(b), tu = tensor(u), tv = tensor(v), tg = tensor(gram), tn = tensor(norms);
    run([&] { return cpu_kernels().cross_covariance->gram(ta, tb, tu, tv, tg, tn); });
  });
  m.def("cosine_softmax", [](py::handle gram, py::handle norms, py::handle temperature, py::handle weights) {
    const Tensor4 tg = tensor(gram), tn = tensor(norms), tt = tensor(temperature), tw = tensor(weights);
    run([&] { return cpu_kernels().cross_covariance->softmax(tg, tn, tt, tw); });
  });
  m.def("cosine_softmax_backward", [](py::handle grad, py::handle weights, py::handle gram, py::handle norms,
                                      py::handle temperature, py::handle scales, py::handle dtemperature) {
    const Tensor4 td = tensor(grad), tw = tensor(weights), tg = tensor(gram), tn = tensor(norms);
    const Tensor4 tt = tensor(temperature), ts = tensor(scales), tdt = tensor(dtemperature);
    run([&] { return cpu_kernels().cross_covariance->softmax_backward(td, tw, tg, tn, tt, ts, tdt); });
  });
  m.def("apply_by_head",
        [](py::handle matrix, bool transposed, py::handle x, py::handle scale, py::handle z, py::handle y) {
          const Tensor4 tm = tensor(matrix), tx = tensor(x), ts = tensor(scale), tz = tensor(z), ty = tensor(y);
          run([&] { return cpu_kernels().cross_covariance->apply(tm, transposed, tx, ts, tz, ty); });
        });
  m.def("sum_tokens", [](py::handle x, py::handle sums, py::handle centred) {
    const Tensor4 tx = tensor(x), ts = tensor(sums), tc = tensor(centred);
    run([&] { return cpu_kernels().cross_covariance->sum_tokens(tx, ts, tc); });
  });
  m.def("global_filter", [](py::handle x, py::handle w, py::handle y) {
    const Tensor4 tx = tensor(x), tw = tensor(w), ty = tensor(y);
    run([&] { return cpu_kernels().global_filter->forward(tx, tw, ty); });
  });
  m.def("global_filter_backward", [](py::handle dy, py::handle x, py::handle w, py::handle dx, py::handle dw) {
    const Tensor4 tdy = tensor(dy), tx = tensor(x), tw = tensor(w), tdx = tensor(dx), tdw = tensor(dw);
    run([&] { return cpu_kernels().global_filter->backward(tdy, tx, tw, tdx, tdw); });
  });

  m.def("moga_gate", [](py::handle g, py::handle v, py::handle y, bool doubled) {
    const Tensor4 tg = tensor(g), tv = tensor(v), ty = tensor(y);
    run([&] { return cpu_kernels().moga_gate->forward(tg, tv, ty, doubled); });
  });
  m.def("moga_gate_backward",
        [](py::handle dy, py::handle g, py::handle v, py::handle dg, py::handle dv, bool doubled) {
          const Tensor4 tdy = tensor(dy), tg = tensor(g), tv = tensor(v), tdg = tensor(dg), tdv = tensor(dv);
          run([&] { return cpu_kernels().moga_gate->backward(tdy, tg, tv, tdg, tdv, doubled); });
        });
  m.def("image_means", [](py::handle x, py::handle mean) {
    const Tensor4 tx = tensor(x), tmean = tensor(mean);
    run([&] { return cpu_kernels().feature_decompose->means(tx, tmean); });
  });
  m.def("feature_decompose", [](py::handle x, py::handle mean, py::handle sigma, py::handle y, int activation) {
    const Tensor4 tx = tensor(x), tmean = tensor(mean), tsigma = tensor(sigma), ty = tensor(y);
    run([&] { return cpu_kernels().feature_decompose->forward(tx, tmean, tsigma, ty, Activation(activation)); });
  });
  m.def("feature_decompose_backward", [](py::handle dy, py::handle x, py::handle mean, py::handle sigma, py::handle dx,
                                         py::handle dsigma, int activation) {
    const Tensor4 tdy = tensor(dy), tx = tensor(x), tmean = tensor(mean), tsigma = tensor(sigma), tdx = tensor(dx),
                  tdsigma = tensor(dsigma);
    run([&] {
      const FeatureDecomposeOps& ops = *cpu_kernels().feature_decompose;
      return ops.backward(tdy, tx, tmean, tsigma, tdx, tdsigma, Activation(activation));
    });
  });
  m.def("channel_aggregation", [](py::handle f, py::handle w, py::handle b, py::handle v, py::handle c, py::handle h,
                                  py::handle d, py::handle scores, const py::tuple& size) {
    const Tensor4 tf = tensor(f), tw = tensor(w), tb = tensor(b), tv = tensor(v), tc = tensor(c), th = tensor(h);
    const Tensor4 td = tensor(d), tscores = tensor(scores);
    const DwConv k = conv(size);
    run([&] { return cpu_kernels().channel_aggregation_ffn->forward(tf, tw, tb, tv, tc, th, td, tscores, k); });
  });
  m.def("channel_aggregation_backward",
        [](py::handle f, py::handle w, py::handle b, py::handle v, py::handle scores, py::handle dd, py::handle dh,
           py::handle h, py::handle d, py::handle df, py::handle dw, py::handle db, py::handle dv, py::handle dc,
           py::handle df_sums, int64_t first, const py::tuple& size) {
          const Tensor4 tf = tensor(f), tw = tensor(w), tb = tensor(b), tv = tensor(v), tscores = tensor(scores);
          const Tensor4 tdd = tensor(dd), tdh = tensor(dh), th = tensor(h), td = tensor(d);
          const ChannelAggregationFfnGrads grads = {tensor(df), tensor(dw), tensor(db),
                                                    tensor(dv), tensor(dc), tensor(df_sums)};
          const DwConv k = conv(size);
          run([&] {
            const ChannelAggregationFfnOps& ops = *cpu_kernels().channel_aggregation_ffn;
            return ops.backward(tf, tw, tb, tv, tscores, tdd, tdh, th, td, grads, first, k);
          });
        });

  m.def("channel_aggregation_ffn", [](const py::sequence& arguments, const py::tuple& chunk, py::handle f, py::handle h,
                                      py::handle scores, py::handle y) {
    const ChannelAggregationFfn a = channel_aggregation_ffn_of(arguments);
    const ChannelAggregationFfnChunks chunks = chunks_of(chunk);
    const Tensor4 tf = tensor(f), th = tensor(h), tscores = tensor(scores), ty = tensor(y);
    run([&] { return channel_aggregation_ffn(a, chunks, tf, th, tscores, ty); });
  });
  m.def("channel_aggregation_ffn_backward",
        [](const py::sequence& arguments, const py::tuple& chunk, py::handle dy, py::handle scores, py::handle f,
           bool kept, const py::sequence& buffers, py::handle dx, const py::sequence& totals) {
          const ChannelAggregationFfn a = channel_aggregation_ffn_of(arguments);
          const ChannelAggregationFfnChunks chunks = chunks_of(chunk);
          const Tensor4 tdy = tensor(dy), tscores = tensor(scores), tf = tensor(f), tdx = tensor(dx);
          const std::vector<Tensor4> b = tensors(buffers), t = tensors(totals);
          const ChannelAggregationFfnBuffers hidden = {b.at(0), b.at(1), b.at(2)};
          const ChannelAggregationFfnTotals sums = {t.at(0), t.at(1), t.at(2), t.at(3), t.at(4), t.at(5), t.at(6)};
          run([&] { return channel_aggregation_ffn_backward(a, chunks, tdy, tscores, tf, kept, hidden, tdx, sums); });
        });

  m.def("pointwise", [](py::handle x, py::handle w, py::handle b, py::handle z, int combine, py::handle y) {
    const Tensor4 tx = tensor(x), tw = tensor(w), tb = tensor(b), tz = tensor(z), ty = tensor(y);
    run([&] { return cpu_kernels().pointwise->forward(tx, tw, tb, tz, Combine(combine), ty); });
  });
  m.def("pointwise_backward_weight", [](py::handle dy, py::handle x, py::handle dw) {
    const Tensor4 tdy = tensor(dy), tx = tensor(x), tdw = tensor(dw);
    run([&] { return cpu_kernels().pointwise->backward_weight(tdy, tx, tdw); });
  });

  m.def("edge_sums", [](py::handle map, py::handle sums) {
    const Tensor4 tmap = tensor(map), tsums = tensor(sums);
    run([&] { return cpu_kernels().shift_split_attention->edge_sums(tmap, tsums); });
  });
  m.def("pool", [](py::handle sums, py::handle pooled) {
    const Tensor4 tsums = tensor(sums), tpooled = tensor(pooled);
    run([&] { return cpu_kernels().shift_split_attention->pool(tsums, tpooled); });
  });
  m.def("pool_linear", [](py::handle sums, py::handle w, py::handle b, int64_t pixels, py::handle pooled) {
    const Tensor4 tsums = tensor(sums), tw = tensor(w), tb = tensor(b), tpooled = tensor(pooled);
    run([&] { return cpu_kernels().shift_split_attention->pool_linear(tsums, tw, tb, pixels, tpooled); });
  });
  m.def("branch_weights", [](py::handle pooled, py::handle mlp1, py::handle mlp2, py::handle hidden,
                             py::handle weights) {
    const Tensor4 tpooled = tensor(pooled), tmlp1 = tensor(mlp1), tmlp2 = tensor(mlp2);
    const Tensor4 thidden = tensor(hidden), tweights = tensor(weights);
    run([&] { return cpu_kernels().shift_split_attention->branch_weights(tpooled, tmlp1, tmlp2, thidden, tweights); });
  });
  m.def("branch_weights_backward", [](py::handle dweights, py::handle weights, py::handle hidden, py::handle pooled,
                                      py::handle mlp1, py::handle mlp2, py::handle dmlp1, py::handle dmlp2,
                                      py::handle dpooled) {
    const Tensor4 tdweights = tensor(dweights), tweights = tensor(weights), thidden = tensor(hidden);
    const Tensor4 tpooled = tensor(pooled), tmlp1 = tensor(mlp1), tmlp2 = tensor(mlp2);
    const Tensor4 tdmlp1 = tensor(dmlp1), tdmlp2 = tensor(dmlp2), tdpooled = tensor(dpooled);
    run([&] {
      const ShiftSplitAttentionOps& ops = *cpu_kernels().shift_split_attention;
      return ops.branch_weights_backward(tdweights, tweights, thidden, tpooled, tmlp1, tmlp2, tdmlp1, tdmlp2, tdpooled);
    });
  });
  m.def("weigh", [](py::handle x, py::handle weights, py::handle offset, py::handle y) {
    const Tensor4 tx = tensor(x), tweights = tensor(weights), toffset = tensor(offset), ty = tensor(y);
    run([&] { return cpu_kernels().shift_split_attention->weigh(tx, tweights, toffset, ty); });
  });
  m.def("linear_weigh_linear", [](py::handle x, py::handle mlp1, py::handle weights, py::handle offset, py::handle mlp2,
                                  py::handle bias, py::handle branches, py::handle weighed, py::handle y) {
    const LinearWeighLinear t = {tensor(x),    tensor(mlp1), tensor(weights),  tensor(offset),
                                 tensor(mlp2), tensor(bias), tensor(branches), tensor(weighed)};
    const Tensor4 ty = tensor(y);
    run([&] { return cpu_kernels().shift_split_attention->linear_weigh_linear(t, ty); });
  });
  m.def("weigh_backward_weights",
        [](py::handle dy, py::handle x, py::handle weights, py::handle offset, py::handle sums, py::handle y) {
          const Tensor4 tdy = tensor(dy), tx = tensor(x), tweights = tensor(weights), toffset = tensor(offset);
          const Tensor4 tsums = tensor(sums), ty = tensor(y);
          run([&] {
            return cpu_kernels().shift_split_attention->weigh_backward_weights(tdy, tx, tweights, toffset, tsums, ty);
          });
        });
  m.def("weigh_backward_input", [](py::handle dy, py::handle weights, py::handle dpooled, py::handle dx) {
    const Tensor4 tdy = tensor(dy), tweights = tensor(weights), tdpooled = tensor(dpooled), tdx = tensor(dx);
    run([&] { return cpu_kernels().shift_split_attention->weigh_backward_input(tdy, tweights, tdpooled, tdx); });
  });
}
