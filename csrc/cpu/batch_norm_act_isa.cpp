#include "batch_norm_lines.h"

namespace vops {
namespace VOPS_ISA {
namespace {

template <int N, class V>
VOPS_INLINE void activate_group(V (&u)[N], Activation act) {
  if (act == kGelu) gelu_of(u);
  if (act == kSilu) {
    for (int j = 0; j < N; j++) u[j] = silu(u[j]);
  }
}
// z becomes act(z), or stays without one.
template <int N, class V>
VOPS_INLINE void slopes(V (&z)[N], V (&slope)[N], Activation act) {
  if (act == kGelu) return gelu_and_slope(z, slope);
  for (int j = 0; j < N; j++) slope[j] = act == kSilu ? silu_grad(z[j]) : V{} + 1;
}

// The coefficients of one image; those of the input's gradient are slope and constant.
template <class A>
struct Coefficients {
  const A *scale, *shift, *mean, *slope, *constant, *gate, *offset;
};
// The rows of a table.
enum Row : int64_t { kScale, kShift, kMean, kInverse, kVariance };
// Copies of coefficients, whose last vector is whole.
template <class A>
struct Given {
  ChannelRows<A> rows;
  bool gates;
  int64_t offsets_at;  // 0 without offsets
  Coefficients<A> of(int64_t image) const {
    return {rows[0],
            rows[1],
            rows[2],
            rows[3],
            rows[4],
            gates ? rows[5 + image] : nullptr,
            offsets_at ? rows[offsets_at + image] : nullptr};
  }
};
template <class A>
Given<A> copy_coefficients(const BatchNormCoefficients& c, const Tensor4& line, int64_t images, int64_t channels) {
  const int64_t gates = c.gate.data ? images : 0, offsets = c.offset.data ? images : 0;
  const ChannelRows<A> rows = make_coefficients<A>(channels, 5 + gates + offsets);
  const auto copy = [&](int64_t first, const Tensor4& from, int64_t count) {
    for (int64_t i = 0; rows.data && from.data && i < count; i++) {
      memcpy(rows[first + i], (const A*)from.data + i * channels, channels * sizeof(A));
    }
  };
  copy(0, c.table, kMean + 1);
  copy(3, line, 2);
  copy(5, c.gate, gates);
  copy(5 + gates, c.offset, offsets);
  return {rows, gates > 0, offsets > 0 ? 5 + gates : 0};
}

// N vectors of a line from an offset on: z, and dz, which is dy * gate + offset before.
template <class P, int N>
struct Group {
  typedef typename P::A A;
  const P& part;
  const Coefficients<A>& c;
  int64_t line, offset;
  Vec<A> of(const A* values, int j) const { return of_channel(part, values, line, offset + j * kLanes); }
  void normalize(const Vec<A> (&x)[N], Vec<A> (&z)[N]) const {
    for (int j = 0; j < N; j++) z[j] = of(c.scale, j) * x[j] + of(c.shift, j);
  }
  void gate(Vec<A> (&dy)[N]) const {
    for (int j = 0; c.gate && j < N; j++) dy[j] *= of(c.gate, j);
    for (int j = 0; c.offset && j < N; j++) dy[j] += of(c.offset, j);
  }
  // z becomes act(z).
  void gradient(const Vec<A> (&x)[N], Vec<A> (&dy)[N], Vec<A> (&z)[N], Activation act) const {
    gate(dy);
    normalize(x, z);
    if (act == kNoActivation) return;
    Vec<A> slope[N];
    slopes(z, slope, act);
    for (int j = 0; j < N; j++) dy[j] *= slope[j];
  }
  void add_to(A* sums, const Vec<A> (&v)[N], Vec<A>& of_plane) const {
    for (int j = 0; j < N; j++) {
      if (part.planes()) {
        of_plane += v[j];
      } else {
        store(sums + offset + j * kLanes, load(sums + offset + j * kLanes) + v[j]);
      }
    }
  }
};
constexpr int64_t kActivationWork = 16;  // in multiply-adds

Error prepare(const Tensor4& x, const Tensor4& weight, const Tensor4& bias, const Tensor4& mean,
              const Tensor4& variance, const Tensor4& table, double eps) {
  return with_sum_type(table.dtype, [&](auto zero) {
    typedef decltype(zero) A;
    const int64_t channels = table.size[1];
    const Channels all = {0, channels};
    A* const out = (A*)table.data;
    Tensor4 own_mean = table, own_variance = table;
    own_mean.data = out + kMean * channels, own_variance.data = out + kVariance * channels;
    if (x.data) {
      if (Error error = batch_norm_moments(x, own_mean, own_variance)) return error;
    }
    const ChannelRows<A> rows = make_coefficients<A>(channels, 4);
    if (!rows.data) return kOutOfMemory;
    pack_rows<A>(weight, 0, all, 0, 1, rows[0], kLanes);
    pack_rows<A>(bias, 0, all, 0, 1, rows[1], kLanes);
    if (!x.data) {
      pack_rows<A>(mean, 0, all, 0, 1, rows[2], kLanes);
      pack_rows<A>(variance, 0, all, 0, 1, rows[3], kLanes);
      memcpy(own_mean.data, rows[2], channels * sizeof(A));
      memcpy(own_variance.data, rows[3], channels * sizeof(A));
    }
    const A count = x.data ? (A)(x.size[0] * x.size[2] * x.size[3]) : 0;
    const A correction = count > 1 ? count / (count - 1) : 1;
    for (int64_t c = 0; c < channels; c++) {
      const A biased = out[kVariance * channels + c];
      const A inverse = 1 / (A)__builtin_sqrt((double)(biased + (A)eps)), scale = rows[0][c] * inverse;
      out[kScale * channels + c] = scale;
      out[kShift * channels + c] = rows[1][c] - scale * out[kMean * channels + c];
      out[kInverse * channels + c] = inverse;
      out[kVariance * channels + c] = biased * correction;
    }
    return (Error) nullptr;
  });
}

Error forward(const Tensor4& x, const BatchNormCoefficients& given, const Tensor4& y, const Tensor4& means,
              Activation act) {
  Lines lines;
  if (Error error = find_image_lines(&lines, x, y)) return error;
  return with_sum_type(x.dtype, [&](auto zero) {
    typedef decltype(zero) A;
    const int64_t channels = x.size[1], images = lines.images;
    const Given<A> copied = copy_coefficients<A>(given, {}, images, channels);
    const PartialSums<A> sums = make_sums<A>(lines, channels, means.data ? 1 : 0);
    if (!copied.rows.data || !sums.data) return kOutOfMemory;
    const Error error = for_each_part<A>(lines, x.dtype, sums, kActivationWork, [&](auto part) {
      const auto from = part.in(x);
      const auto to = part.out(y);
      const Coefficients<A> c = copied.of(part.image);
      const Activation activation = act;
      A* const own = means.data ? own_sums(part, sums) : nullptr;
      for (int64_t i = part.begin; i < part.end; i++) {
        const auto* p = from[i];
        auto* q = to[i];
        Vec<A> of_plane = {};
        for_each_group<kJam>(part, part.lines.length,
                             [&](int64_t k, auto count, const auto& get, const auto& put, auto keep) {
                               constexpr int N = decltype(count)::value;
                               const Group<decltype(part), N> group = {part, c, i, k};
                               Vec<A> v[N], z[N];
                               for (int j = 0; j < N; j++) v[j] = get(p + k + j * kLanes);
                               group.normalize(v, z);
                               activate_group(z, activation);
                               for (int j = 0; j < N; j++) v[j] = keep(z[j]);
                               if (own) group.add_to(own, v, of_plane);
                               for (int j = 0; j < N; j++) put(q + k + j * kLanes, z[j]);
                             });
        if (part.planes() && own) own[i] += sum_of_lanes<A>(of_plane);
      }
    });
    const A pixels = (A)max64(x.size[2] * x.size[3], 1);
    for (int64_t n = 0; !error && means.data && n < images; n++) {
      const A* total = sums.total(n);
      for (int64_t c = 0; c < channels; c++) ((A*)means.data)[n * channels + c] = total[c] / pixels;
    }
    return error;
  });
}

// sums: rows of `step` numbers, 2, or with an offset 5 for each image.
template <class A>
Error finish_sums(const A* sums, int64_t step, const BatchNormCoefficients& c, const BatchNormEnds& ends) {
  const int64_t channels = c.table.size[1], images = c.offset.size[0];
  const ChannelRows<A> rows = make_coefficients<A>(channels, 6);
  if (!rows.data) return kOutOfMemory;
  A *of_dz = rows[0], *of_product = rows[1], *slope = rows[2], *constant = rows[3], *dweight = rows[4],
    *dbias = rows[5];
  const A *gate = (const A*)c.gate.data, *offset = (const A*)c.offset.data;
  for (int64_t n = 0; n < images; n++) {
    const A* part = sums + (n * 5 + 1) * step;
    for (int64_t k = 0; k < channels; k++) {
      const A g = gate[n * channels + k], o = offset[n * channels + k];
      of_dz[k] += g * part[k] + o * part[step + k];
      of_product[k] += g * part[2 * step + k] + o * part[3 * step + k];
    }
  }
  if (!c.gate.size[1]) {
    memcpy(of_dz, sums, channels * sizeof(A));
    memcpy(of_product, sums + step, channels * sizeof(A));
  }
  const A *scale = (const A*)c.table.data, *inverse = scale + kInverse * channels;
  for (int64_t k = 0; k < channels; k++) {
    const A factor = -scale[k] / (A)max64(ends.count, 1);
    slope[k] = of_product[k] * factor * inverse[k] * inverse[k];
    constant[k] = of_dz[k] * factor;
    dweight[k] = of_product[k] * inverse[k];
    dbias[k] = of_dz[k];
  }
  if (ends.line.data) {
    memcpy(ends.line.data, slope, channels * sizeof(A));
    memcpy((A*)ends.line.data + channels, constant, channels * sizeof(A));
  }
  if (ends.dweight.data) unpack_rows<A>(dweight, kLanes, ends.dweight, 0, {0, channels}, 0, 1);
  if (ends.dbias.data) unpack_rows<A>(dbias, kLanes, ends.dbias, 0, {0, channels}, 0, 1);
  return nullptr;
}
Error finish(const Tensor4& sums, const BatchNormCoefficients& c, const BatchNormEnds& ends) {
  return with_sum_type(c.table.dtype, [&](auto zero) {
    return finish_sums((const decltype(zero)*)sums.data, c.table.size[1], c, ends);
  });
}

// The terms of the sums of a group, of which z becomes act(z).
template <class P, int N>
VOPS_INLINE void sum_terms(const Group<P, N>& group, const Vec<typename P::A> (&x)[N], Vec<typename P::A> (&dy)[N],
                           Vec<typename P::A> (&z)[N], Activation act, Vec<typename P::A> (&term)[2][N]) {
  group.gradient(x, dy, z, act);
  for (int j = 0; j < N; j++) term[0][j] = dy[j], term[1][j] = dy[j] * (x[j] - group.of(group.c.mean, j));
}
template <class P, int N>
VOPS_INLINE void sum_terms(const Group<P, N>& group, const Vec<typename P::A> (&x)[N], Vec<typename P::A> (&dy)[N],
                           Vec<typename P::A> (&z)[N], Activation act, Vec<typename P::A> (&term)[5][N]) {
  Vec<typename P::A> slope[N];
  group.normalize(x, z);
  slopes(z, slope, act);
  for (int j = 0; j < N; j++) {
    const Vec<typename P::A> difference = x[j] - group.of(group.c.mean, j);
    term[0][j] = dy[j] * z[j];
    term[1][j] = dy[j] * slope[j];
    term[2][j] = slope[j];
    term[3][j] = term[1][j] * difference;
    term[4][j] = slope[j] * difference;
  }
}

// act(z), times a gate if there is one, and sums by image: `terms` of them, which end(sums, step) takes.
template <int terms, class End>
Error run_sums(const Tensor4& dy, const Tensor4& x, const BatchNormCoefficients& given, const Tensor4& y,
               Activation act, const End& end) {
  Lines lines;
  if (Error error = find_image_lines(&lines, x, dy, y.data ? y : x)) return error;
  return with_sum_type(x.dtype, [&](auto zero) {
    typedef decltype(zero) A;
    const int64_t channels = x.size[1], step = padded(channels);
    const Given<A> copied = copy_coefficients<A>(given, {}, lines.images, channels);
    const PartialSums<A> sums = make_sums<A>(lines, channels, terms);
    if (!copied.rows.data || !sums.data) return kOutOfMemory;
    const Error error = for_each_part<A>(lines, x.dtype, sums, kActivationWork, [&](auto part) {
      const auto from = part.in(x), grads = part.in(dy);
      const auto to = part.out(y);
      Coefficients<A> c = copied.of(part.image);
      const A* const gate = c.gate;
      c.gate = nullptr;  // of y only
      const Activation activation = act;
      A* const own = own_sums(part, sums);
      for (int64_t i = part.begin; i < part.end; i++) {
        const auto *p = from[i], *g = grads[i];
        auto* q = to[i];
        Vec<A> of_plane[terms] = {};
        for_each_group<kBackwardJam>(part, part.lines.length,
                                     [&](int64_t k, auto count, const auto& get, const auto& put, auto keep) {
                                       constexpr int N = decltype(count)::value;
                                       const Group<decltype(part), N> group = {part, c, i, k};
                                       Vec<A> v[N], dz[N], z[N], term[terms][N];
                                       for (int j = 0; j < N; j++)
                                         v[j] = get(p + k + j * kLanes), dz[j] = get(g + k + j * kLanes);
                                       sum_terms(group, v, dz, z, activation, term);
                                       for (int s = 0; s < terms; s++) {
                                         for (int j = 0; j < N; j++) term[s][j] = keep(term[s][j]);
                                         group.add_to(own + s * step, term[s], of_plane[s]);
                                       }
                                       for (int j = 0; q && j < N; j++)
                                         put(q + k + j * kLanes, gate ? z[j] * group.of(gate, j) : z[j]);
                                     });
        for (int s = 0; part.planes() && s < terms; s++) own[s * step + i] += sum_of_lanes<A>(of_plane[s]);
      }
    });
    return error ? error : end(lines, sums, step);
  });
}

Error backward_sums(const Tensor4& dy, const Tensor4& x, const BatchNormCoefficients& c, const Tensor4& y,
                    const BatchNormEnds& ends, Activation act) {
  return run_sums<2>(dy, x, c, y, act, [&](const Lines& lines, const auto& sums, int64_t step) {
    return finish_sums(sums.joined(lines.images).total(0), step, {c.table, {}, {}}, ends);
  });
}
Error backward_images(const Tensor4& dy, const Tensor4& x, const BatchNormCoefficients& c, const Tensor4& y,
                      const Tensor4& out, Activation act) {
  return run_sums<5>(dy, x, c, y, act, [&](const Lines& lines, const auto& sums, int64_t step) {
    for (int64_t n = 0; n < lines.images; n++) {
      const auto* total = sums.total(n);
      for (int64_t s = 0; s < 5; s++) {
        memcpy((decltype(sums.data))out.data + (n * 5 + s) * x.size[1], total + s * step, x.size[1] * sizeof(*total));
      }
    }
    return (Error) nullptr;
  });
}

Error backward_input(const Tensor4& dy, const Tensor4& x, const BatchNormCoefficients& given, const Tensor4& line,
                     const Tensor4& plus, const Tensor4& dx, Activation act) {
  Lines lines;
  if (Error error = find_image_lines(&lines, x, dy.data ? dy : x, plus.data ? plus : x, dx)) return error;
  return with_sum_type(x.dtype, [&](auto zero) {
    typedef decltype(zero) A;
    const Given<A> copied = copy_coefficients<A>(given, line, lines.images, x.size[1]);
    if (!copied.rows.data) return kOutOfMemory;
    return for_each_part<A>(lines, x.dtype, kActivationWork, [&](auto part) {
      const auto from = part.in(x), grads = part.in(dy), others = part.in(plus);
      const auto to = part.out(dx);
      const Coefficients<A> c = copied.of(part.image);
      const Activation activation = act;
      for (int64_t i = part.begin; i < part.end; i++) {
        const auto *p = from[i], *g = grads[i], *more = others[i];
        auto* q = to[i];
        for_each_group<kBackwardJam>(
            part, part.lines.length, [&](int64_t k, auto count, const auto& get, const auto& put, auto) {
              constexpr int N = decltype(count)::value;
              const Group<decltype(part), N> group = {part, c, i, k};
              Vec<A> v[N], dz[N] = {}, z[N];
              for (int j = 0; j < N; j++) v[j] = get(p + k + j * kLanes);
              for (int j = 0; g && j < N; j++) dz[j] = get(g + k + j * kLanes);
              if (g) group.gradient(v, dz, z, activation);
              for (int j = 0; j < N; j++) {
                Vec<A> sum = group.of(c.slope, j) * (v[j] - group.of(c.mean, j)) + group.of(c.constant, j);
                if (g) sum = group.of(c.scale, j) * dz[j] + sum;
                if (more) sum += get(more + k + j * kLanes);
                put(q + k + j * kLanes, sum);
              }
            });
      }
    });
  });
}

}  // namespace

extern const BatchNormActOps batch_norm_act_ops;
const BatchNormActOps batch_norm_act_ops = {prepare, forward, backward_sums, backward_images, finish, backward_input};

}  // namespace VOPS_ISA
}  // namespace vops
