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
// Copies of them, whose last vector is whole.
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
  copy(0, c.scale, 1);
  copy(1, c.shift, 1);
  copy(2, c.mean, 1);
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
  void gradient(const Vec<A> (&x)[N], Vec<A> (&dy)[N], Activation act) const {
    gate(dy);
    if (act == kNoActivation) return;
    Vec<A> z[N], slope[N];
    normalize(x, z);
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

// act(z), or act(z) * dy, summed over the pixels of every image and, if there is a y, written.
Error run_forward(const Lines& lines, const Tensor4& dy, const Tensor4& x, const BatchNormCoefficients& given,
                  const Tensor4& y, const Tensor4& out, Activation act) {
  return with_sum_type(x.dtype, [&](auto zero) {
    typedef decltype(zero) A;
    const int64_t channels = x.size[1], images = lines.images;
    const Given<A> copied = copy_coefficients<A>(given, {}, images, channels);
    const PartialSums<A> sums = make_sums<A>(lines, channels, out.data ? 1 : 0);
    if (!copied.rows.data || !sums.data) return kOutOfMemory;
    const Error error = for_each_part<A>(lines, x.dtype, sums, kActivationWork, [&](auto part) {
      const auto from = part.in(x), by = part.in(dy);
      const auto to = part.out(y);
      const Coefficients<A> c = copied.of(part.image);
      const Activation activation = act;
      A* const own = out.data ? own_sums(part, sums) : nullptr;
      for (int64_t i = part.begin; i < part.end; i++) {
        const auto *p = from[i], *g = by[i];
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
                               for (int j = 0; j < N; j++) {
                                 v[j] = keep(z[j]);
                                 if (g) v[j] *= get(g + k + j * kLanes);
                               }
                               if (own) group.add_to(own, v, of_plane);
                               if (!q) return;
                               for (int j = 0; j < N; j++)
                                 put(q + k + j * kLanes, c.gate ? z[j] * group.of(c.gate, j) : z[j]);
                             });
        if (part.planes() && own) own[i] += sum_of_lanes<A>(of_plane);
      }
    });
    for (int64_t n = 0; !error && out.data && n < images; n++) {
      memcpy((A*)out.data + n * channels, sums.total(n), channels * sizeof(A));
    }
    return error;
  });
}

Error forward(const Tensor4& x, const BatchNormCoefficients& c, const Tensor4& y, const Tensor4& sums, Activation act) {
  Lines lines;
  if (Error error = find_image_lines(&lines, x, y.data ? y : x)) return error;
  return run_forward(lines, {}, x, c, y, sums, act);
}
Error backward_gate(const Tensor4& dy, const Tensor4& x, const BatchNormCoefficients& c, const Tensor4& sums,
                    Activation act) {
  Lines lines;
  if (Error error = find_image_lines(&lines, x, dy)) return error;
  return run_forward(lines, dy, x, c, {}, sums, act);
}

Error backward_sums(const Tensor4& dy, const Tensor4& x, const BatchNormCoefficients& given, const Tensor4& out,
                    Activation act) {
  Lines lines;
  if (Error error = find_image_lines(&lines, x, dy)) return error;
  return with_sum_type(x.dtype, [&](auto zero) {
    typedef decltype(zero) A;
    const int64_t channels = x.size[1], step = padded(channels);
    const Given<A> copied = copy_coefficients<A>(given, {}, lines.images, channels);
    const PartialSums<A> sums = make_sums<A>(lines, channels, 2);
    if (!copied.rows.data || !sums.data) return kOutOfMemory;
    const Error error = for_each_part<A>(lines, x.dtype, sums, kActivationWork, [&](auto part) {
      const auto from = part.in(x), grads = part.in(dy);
      const Coefficients<A> c = copied.of(part.image);
      const Activation activation = act;
      A *const of_dz = own_sums(part, sums), *const of_product = of_dz + step;
      for (int64_t i = part.begin; i < part.end; i++) {
        const auto *p = from[i], *g = grads[i];
        Vec<A> plane_dz = {}, plane_product = {};
        for_each_group<kBackwardJam>(part, part.lines.length,
                                     [&](int64_t k, auto count, const auto& get, const auto&, auto keep) {
                                       constexpr int N = decltype(count)::value;
                                       const Group<decltype(part), N> group = {part, c, i, k};
                                       Vec<A> v[N], dz[N];
                                       for (int j = 0; j < N; j++)
                                         v[j] = get(p + k + j * kLanes), dz[j] = get(g + k + j * kLanes);
                                       group.gradient(v, dz, activation);
                                       for (int j = 0; j < N; j++)
                                         dz[j] = keep(dz[j]), v[j] = dz[j] * (v[j] - group.of(c.mean, j));
                                       group.add_to(of_dz, dz, plane_dz);
                                       group.add_to(of_product, v, plane_product);
                                     });
        if (part.planes()) of_dz[i] += sum_of_lanes<A>(plane_dz), of_product[i] += sum_of_lanes<A>(plane_product);
      }
    });
    if (error) return error;
    const A* total = sums.joined(lines.images).total(0);
    for (int64_t i = 0; i < 2; i++) memcpy((A*)out.data + i * channels, total + i * step, channels * sizeof(A));
    return error;
  });
}

Error backward_input(const Tensor4& dy, const Tensor4& x, const BatchNormCoefficients& given, const Tensor4& line,
                     const Tensor4& dx, Activation act) {
  Lines lines;
  if (Error error = find_image_lines(&lines, x, dy, dx)) return error;
  return with_sum_type(x.dtype, [&](auto zero) {
    typedef decltype(zero) A;
    const Given<A> copied = copy_coefficients<A>(given, line, lines.images, x.size[1]);
    if (!copied.rows.data) return kOutOfMemory;
    return for_each_part<A>(lines, x.dtype, kActivationWork, [&](auto part) {
      const auto from = part.in(x), grads = part.in(dy);
      const auto to = part.out(dx);
      const Coefficients<A> c = copied.of(part.image);
      const Activation activation = act;
      for (int64_t i = part.begin; i < part.end; i++) {
        const auto *p = from[i], *g = grads[i];
        auto* q = to[i];
        for_each_group<kBackwardJam>(
            part, part.lines.length, [&](int64_t k, auto count, const auto& get, const auto& put, auto) {
              constexpr int N = decltype(count)::value;
              const Group<decltype(part), N> group = {part, c, i, k};
              Vec<A> v[N], dz[N];
              for (int j = 0; j < N; j++) v[j] = get(p + k + j * kLanes), dz[j] = get(g + k + j * kLanes);
              group.gradient(v, dz, activation);
              for (int j = 0; j < N; j++) {
                const Vec<A> of_x = group.of(c.slope, j) * (v[j] - group.of(c.mean, j)) + group.of(c.constant, j);
                put(q + k + j * kLanes, group.of(c.scale, j) * dz[j] + of_x);
              }
            });
      }
    });
  });
}

}  // namespace

extern const BatchNormActOps batch_norm_act_ops;
const BatchNormActOps batch_norm_act_ops = {batch_norm_moments, forward, backward_gate, backward_sums, backward_input};

}  // namespace VOPS_ISA
}  // namespace vops
