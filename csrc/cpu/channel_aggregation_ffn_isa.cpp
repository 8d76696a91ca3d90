#include "channel_aggregation_ffn.h"
#include "lines.h"

namespace vops {
namespace VOPS_ISA {
namespace {

struct Pass {
  Tensor4 f, w, b, v, h;
  DwConv conv;
  Tensor4 dh;      // present: the backward pass
  Tensor4 scores;  // or their gradients
};

// The normal distribution function is 1/2 and an odd function of u, here u times a polynomial of u^2, fitted on
// [-5.5, 5.5] with an error of 1e-7. vec.h's form, which is exact relative to tails of 1e-20, takes twice the time, and
// gelu is half the time of the forward pass.
constexpr float kTail = 5.5f;
constexpr int kTerms = 16;
constexpr float kPolynomial[kTerms] = {
    0.1285519301891327f,    -0.06417234241962433f,   0.04773762822151184f,   -0.03879278153181076f,
    0.03207026422023773f,   -0.026048293337225914f,  0.02036452665925026f,   -0.014998910948634148f,
    0.010227952152490616f,  -0.006820345763117075f,  0.004621581640094519f,  -0.002418042393401265f,
    0.0007202630513347685f, -0.0005295611335895956f, 0.0006315109203569591f, -0.00023629680799786001f};

VOPS_INLINE Float fast_normal_cdf(Float u) {
  const Float mapped = u * u * (2 / (kTail * kTail)) - 1.f;  // to [-1, 1] inside
  Float q = splat(kPolynomial[kTerms - 1]);
#pragma GCC unroll 16
  for (int k = kTerms - 2; k >= 0; k--) q = q * mapped + kPolynomial[k];
  const Float inside = u * q + .5f;
  return u < -kTail ? splat(0.f) : u > kTail ? splat(1.f) : inside;
}

// The two epilogues of a vector of the convolution, in which u becomes h.
VOPS_INLINE Float gelu_of(Float u) { return u * fast_normal_cdf(u); }
VOPS_INLINE Double gelu_of(Double u) {
  for (int k = 0; k < kLanes; k++) u[k] = gelu(u[k]);
  return u;
}
// Returns gelu'(u).
VOPS_INLINE Float gelu_and_slope(Float& u) {
  const Float cdf = fast_normal_cdf(u), slope = cdf + u * exp(u * u * -.5f) * 0.39894228040f;
  u *= cdf;
  return slope;
}
VOPS_INLINE Double gelu_and_slope(Double& u) {
  Double slope = u;
  for (int k = 0; k < kLanes; k++) slope[k] = gelu_grad(u[k]), u[k] = gelu(u[k]);
  return slope;
}

// How the work is cut, by shape only: what is summed over tasks must not depend on the threads. A task takes some
// blocks of channels of some rows of some images.
struct Plan {
  bool direct;  // the kernels work on the tensors in place
  int64_t blocks, together, bundles, taps;
  Cut cut;
  int64_t group_rows;  // are computed and stored while they are in the first-level caches
  int64_t units() const { return cut.groups * cut.chunks; }
  int64_t tasks() const { return bundles * units(); }
};
Plan plan_of(const Pass& p, int64_t element) {
  const int64_t batch = p.f.size[0], channels = p.f.size[1], height = p.f.size[2], width = p.f.size[3];
  const bool direct = p.conv.kernel == 3 && channels % kLanes == 0 && p.f.dtype != kFloat64;
  const int64_t blocks = ceil_div(channels, kLanes), together = min64(blocks, direct ? kDirectBlocks : kPackedBlocks);
  const int64_t bundles = ceil_div(blocks, together);
  const int64_t row_bytes = direct ? 1 : together * kLanes * width * element;
  const Cut cut = cut_work(batch, bundles, height, width, row_bytes, p.conv.kernel - 1, kFixedTasks);
  return {direct, blocks, together, bundles, p.conv.kernel * p.conv.kernel, cut, clamp64(128 / width, 2, cut.rows)};
}

// Of pixels that hold u, lying `step` elements apart with their blocks `block_step` apart: u becomes h, and the sums
// over the channels of v * h go to the scores.
template <class A, class T>
VOPS_INLINE void finish_forward(T* u, int64_t step, int64_t block_step, int64_t pixels, int64_t blocks, const A* v,
                                A* scores) {
  for (int64_t i = 0; i < pixels; i++, u += step) {
    Vec<A> sum = {};
    for (int64_t b = 0; b < blocks; b++) {
      const Vec<A> h = gelu_of(load(u + b * block_step));
      store(u + b * block_step, h);
      sum += h * load(v + b * kLanes);
    }
    scores[i] = sum_of_lanes<A>(sum);
  }
}

// u becomes h, and dh becomes du; the sums over the pixels of dscores * h are added to dv.
template <class A, class T>
VOPS_INLINE void finish_backward(T* u, int64_t u_step, int64_t u_block, T* dh, int64_t dh_step, int64_t dh_block,
                                 int64_t pixels, int64_t blocks, const A* v, const A* dscores, A* dv) {
  for (int64_t i = 0; i < pixels; i++, u += u_step, dh += dh_step) {
    const Vec<A> dscore = Vec<A>{} + dscores[i];
    for (int64_t b = 0; b < blocks; b++) {
      Vec<A> h = load(u + b * u_block);
      const Vec<A> slope = gelu_and_slope(h);
      store(u + b * u_block, h);
      store(dh + b * dh_block, (load(dh + b * dh_block) + dscore * load(v + b * kLanes)) * slope);
      store(dv + b * kLanes, load(dv + b * kLanes) + dscore * h);
    }
  }
}

template <class A>
struct Scratch {
  A *weights, *v, *source, *out, *dh;
  int64_t weight_step, source_step, out_step;
  static int64_t source_rows(const Pass& p, const Plan& plan) {
    return min64(p.f.size[2], plan.cut.rows + p.conv.kernel - 1);
  }
  static int64_t elements(const Pass& p, const Plan& plan) {
    const int64_t panels = plan.direct ? 0 : source_rows(p, plan) + 2 * plan.group_rows;
    return plan.together * kLanes * (plan.taps + 2 + panels * p.f.size[3]);
  }
  Scratch(const Pass& p, const Plan& plan, A* data)
      : weight_step((plan.taps + 1) * kLanes),
        source_step(source_rows(p, plan) * p.f.size[3] * kLanes),
        out_step(plan.group_rows * p.f.size[3] * kLanes) {
    weights = data;
    v = weights + plan.together * weight_step;
    source = v + plan.together * kLanes;
    out = source + plan.together * source_step;
    dh = out + plan.together * out_step;
  }
};

// Rows of image n in place: first the convolution into h, then the epilogue while h is in the cache.
template <class T>
void run_rows_direct(const Pass& p, int64_t n, Channels c, RowRange rows, const Weights<float>& w, const float* v,
                     float* scores, float* dv) {
  const int64_t width = p.f.size[3], blocks = c.blocks();
  const Panel<T> out = tensor_panel<T>(p.h, n, c.begin);
  conv_rows(tensor_panel<const T>(p.f, n, c.begin), p.f.size[2], w, blocks, p.conv, rows, out);
  for (int64_t i = rows.begin; i < rows.end; i++, scores += width) {
    if (p.dh.data) {
      const Panel<T> dh = tensor_panel<T>(p.dh, n, c.begin);
      finish_backward<float>(out.at(i, 0), out.column_step, kLanes, dh.at(i, 0), dh.column_step, kLanes, width, blocks,
                             v, scores, dv);
    } else {
      finish_forward<float>(out.at(i, 0), out.column_step, kLanes, width, blocks, v, scores);
    }
  }
}

template <class A>
void run_rows_packed(const Pass& p, int64_t n, Channels c, RowRange rows, int64_t first_row, const Scratch<A>& s,
                     const Weights<A>& w, A* scores, A* dv) {
  const int64_t width = p.f.size[3], pixels = rows.size() * width;
  const Panel<const A> in = packed_panel<const A>(s.source, first_row, width, s.source_step);
  const Panel<A> out = packed_panel(s.out, rows.begin, width, s.out_step);
  for (int64_t b = 0; b < c.blocks(); b++)
    conv_rows(in.block(b), p.f.size[2], w.block(b), 1, p.conv, rows, out.block(b));
  if (p.dh.data) {
    pack_rows(p.dh, n, c, rows.begin, rows.end, s.dh, s.out_step);
    finish_backward<A>(s.out, kLanes, s.out_step, s.dh, kLanes, s.out_step, pixels, c.blocks(), s.v, scores, dv);
    unpack_rows<A>(s.dh, s.out_step, p.dh, n, c, rows.begin, rows.end);
  } else {
    finish_forward<A>(s.out, kLanes, s.out_step, pixels, c.blocks(), s.v, scores);
  }
  unpack_rows<A>(s.out, s.out_step, p.h, n, c, rows.begin, rows.end);
}

// scores: of the images, for every bundle of blocks apart. dv: [task][together][lane], added to.
template <class A>
Error run(const Pass& p, const Plan& plan, A* scores, A* dv) {
  const int64_t batch = p.f.size[0], channels = p.f.size[1], height = p.f.size[2], width = p.f.size[3];
  const int64_t work = batch * channels * height * width * (plan.taps + 32);
  return for_each_task<A>(plan.tasks(), work, Scratch<A>::elements(p, plan), [&](int64_t task, A* data) {
    const int64_t unit = task % plan.units(), bundle = task / plan.units();
    const Channels c = channels_of_blocks(channels, bundle * plan.together, plan.together);
    const Scratch<A> s(p, plan, data);
    pack_weight(p.w, c, s.weights, s.weight_step);
    pack_bias(p.b, c, s.weights + plan.taps * kLanes, s.weight_step);
    pack_bias(p.v, c, s.v, kLanes);
    const Weights<A> weights = {s.weights, s.weights + plan.taps * kLanes, s.weight_step};
    A* own = dv + task * plan.together * kLanes;
    const RowRange rows = plan.cut.rows_of(unit % plan.cut.chunks, height);
    const RowRange images = plan.cut.images_of(unit / plan.cut.chunks, batch);
    const int64_t first_row = input_rows(rows, height, p.conv).begin;
    for (int64_t n = images.begin; n < images.end; n++) {
      int64_t packed = first_row;
      for (int64_t i = rows.begin; i < rows.end; i += plan.group_rows) {
        const RowRange now = {i, min64(i + plan.group_rows, rows.end)};
        A* to = scores + (((p.dh.data ? 0 : bundle) * batch + n) * height + i) * width;
        if constexpr (sizeof(A) == sizeof(float)) {
          if (plan.direct) {
            if (p.f.dtype == kFloat32) run_rows_direct<float>(p, n, c, now, weights, s.v, to, own);
            if (p.f.dtype == kBFloat16) run_rows_direct<bf16>(p, n, c, now, weights, s.v, to, own);
            if (p.f.dtype == kFloat16) run_rows_direct<f16>(p, n, c, now, weights, s.v, to, own);
            continue;
          }
        }
        const int64_t needed = input_rows(now, height, p.conv).end;
        if (needed > packed) {
          pack_rows(p.f, n, c, packed, needed, s.source + (packed - first_row) * width * kLanes, s.source_step);
          packed = needed;
        }
        run_rows_packed(p, n, c, now, first_row, s, weights, to, own);
      }
    }
  });
}

template <class A>
Error run_forward(const Pass& p) {
  const Plan plan = plan_of(p, sizeof(A));
  const int64_t pixels = p.f.size[0] * p.f.size[2] * p.f.size[3];
  A* parts = (A*)thread_scratch(kSums, plan.bundles * pixels * sizeof(A));
  if (!parts) return kOutOfMemory;
  if (Error error = run<A>(p, plan, parts, nullptr)) return error;
  A* scores = (A*)p.scores.data;
  for (int64_t i = 0; i < pixels; i++) {
    A sum = parts[i];
    for (int64_t b = 1; b < plan.bundles; b++) sum += parts[b * pixels + i];
    scores[i] = sum;
  }
  return nullptr;
}

template <class A>
Error run_backward(const Pass& p, const Tensor4& dv) {
  const Plan plan = plan_of(p, sizeof(A));
  const int64_t step = plan.together * kLanes, bytes = plan.tasks() * step * sizeof(A);
  A* parts = (A*)thread_scratch(kSums, bytes);
  if (!parts) return kOutOfMemory;
  memset(parts, 0, bytes);
  if (Error error = run<A>(p, plan, (A*)p.scores.data, parts)) return error;
  for (int64_t bundle = 0; bundle < plan.bundles; bundle++) {
    A* total = parts + bundle * plan.units() * step;
    for (int64_t unit = 1; unit < plan.units(); unit++) add_panel(total, total + unit * step, plan.together);
    const Channels c = channels_of_blocks(p.f.size[1], bundle * plan.together, plan.together);
    unpack_rows<A>(total, kLanes, dv, 0, c, 0, 1);
  }
  return nullptr;
}

Error forward(const Tensor4& f, const Tensor4& w, const Tensor4& b, const Tensor4& v, const Tensor4& h,
              const Tensor4& scores, DwConv conv) {
  const Pass p = {f, w, b, v, h, conv, {}, scores};
  return f.dtype == kFloat64 ? run_forward<double>(p) : run_forward<float>(p);
}
Error backward(const Tensor4& f, const Tensor4& w, const Tensor4& b, const Tensor4& v, const Tensor4& dscores,
               const Tensor4& dh, const Tensor4& h, const Tensor4& dv, DwConv conv) {
  const Pass p = {f, w, b, v, h, conv, dh, dscores};
  return f.dtype == kFloat64 ? run_backward<double>(p, dv) : run_backward<float>(p, dv);
}

}  // namespace

extern const ChannelAggregationFfnOps channel_aggregation_ffn_ops;
const ChannelAggregationFfnOps channel_aggregation_ffn_ops = {forward, backward};

}  // namespace VOPS_ISA
}  // namespace vops
