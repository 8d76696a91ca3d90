#include "feature_decompose.h"
#include "lines.h"

namespace vops {
namespace VOPS_ISA {
namespace {

template <class V>
VOPS_INLINE V act_of(V x, Activation act) {
  return act == kSilu ? silu(x) : act == kGelu ? gelu(x) : x;
}
template <class V>
VOPS_INLINE V slope_of(V x, Activation act) {
  return act == kSilu ? silu_grad(x) : act == kGelu ? gelu_grad(x) : V{} + 1;
}

constexpr int64_t kActivationWork = 4 * kElementWork;

// sigma, and behind it the means of every image.
template <class A>
ChannelRows<A> copy_coefficients(const Tensor4& mean, const Tensor4& sigma, int64_t images, int64_t channels) {
  const ChannelRows<A> rows = make_coefficients<A>(channels, 1 + images);
  if (!rows.data) return rows;
  pack_bias(sigma, {0, channels}, rows[0], kLanes);
  for (int64_t n = 0; n < images; n++) memcpy(rows[1 + n], (const A*)mean.data + n * channels, channels * sizeof(A));
  return rows;
}

template <class P, class A>
VOPS_INLINE Vec<A> decomposed(const P& part, Vec<A> x, const A* sigma, const A* mean, int64_t line, int64_t offset) {
  return x + of_channel(part, sigma, line, offset) * (x - of_channel(part, mean, line, offset));
}

Error means(const Tensor4& x, const Tensor4& mean) {
  Lines lines;
  if (Error error = find_image_lines(&lines, x)) return error;
  return with_sum_type(x.dtype, [&](auto zero) {
    typedef decltype(zero) A;
    const PartialSums<A> sums = make_sums<A>(lines, x.size[1], 1);
    if (!sums.data) return kOutOfMemory;
    const Error error = add_pixels(lines, x, sums);
    const A pixels = (A)(x.size[2] * x.size[3]);
    for (int64_t n = 0; !error && n < lines.images; n++) {
      const A* total = sums.total(n);
      A* to = (A*)mean.data + n * x.size[1];
      for (int64_t c = 0; c < x.size[1]; c++) to[c] = total[c] / pixels;
    }
    return error;
  });
}

Error forward(const Tensor4& x, const Tensor4& mean, const Tensor4& sigma, const Tensor4& y, Activation act) {
  Lines lines;
  if (Error error = find_image_lines(&lines, x, y)) return error;
  return with_sum_type(x.dtype, [&](auto zero) {
    typedef decltype(zero) A;
    const ChannelRows<A> given = copy_coefficients<A>(mean, sigma, lines.images, x.size[1]);
    if (!given.data) return kOutOfMemory;
    return for_each_part<A>(lines, x.dtype, kActivationWork, [&](auto part) {
      const auto from = part.in(x);
      const auto to = part.out(y);
      const A* const means = given[1 + part.image];
      for (int64_t i = part.begin; i < part.end; i++) {
        const auto* p = from[i];
        auto* q = to[i];
        for_each_vector(part, [&](int64_t k, const auto& get, const auto& put) {
          put(q + k, act_of(decomposed(part, get(p + k), given[0], means, i, k), act));
        });
      }
    });
  });
}

// With z = x + sigma * (x - mean) and dz = dy * act'(z): dsigma = sum of dz * (x - mean), and
// dx = (1 + sigma) * dz - sigma * mean of dz.
Error backward(const Tensor4& dy, const Tensor4& x, const Tensor4& mean, const Tensor4& sigma, const Tensor4& dx,
               const Tensor4& dsigma, Activation act) {
  Lines lines;
  if (Error error = find_image_lines(&lines, dy, x, dx.data ? dx : x)) return error;
  return with_sum_type(x.dtype, [&](auto zero) {
    typedef decltype(zero) A;
    const ChannelRows<A> given = copy_coefficients<A>(mean, sigma, lines.images, x.size[1]);
    const PartialSums<A> sums = make_sums<A>(lines, x.size[1], 2);
    if (!given.data || !sums.data) return kOutOfMemory;
    Error error = for_each_part<A>(lines, x.dtype, sums, kActivationWork, [&](auto part) {
      const auto from = part.in(x), grads = part.in(dy);
      const A* const means = given[1 + part.image];
      A* const own = own_sums(part, sums);
      for (int64_t i = part.begin; i < part.end; i++) {
        const auto *p = from[i], *g = grads[i];
        add_line<2>(part, own, given.step, i, [&](int64_t k, const auto& get, const auto&, auto& values) {
          const Vec<A> v = get(p + k);
          values[0] = get(g + k) * slope_of(decomposed(part, v, given[0], means, i, k), act);
          values[1] = values[0] * (v - of_channel(part, means, i, k));
        });
      }
    });
    if (error) return error;
    A* of_sigma = sums.data + given.step;
    for (int64_t n = 0; n < lines.images; n++) {
      const A* total = sums.total(n);
      if (n > 0) add_panel(of_sigma, total + given.step, given.step / kLanes);
    }
    if (dsigma.data) unpack_rows<A>(of_sigma, kLanes, dsigma, 0, {0, x.size[1]}, 0, 1);
    if (!dx.data) return error;
    const A share_of_pixel = 1 / (A)(x.size[2] * x.size[3]);
    return for_each_part<A>(lines, x.dtype, kActivationWork, [&](auto part) {
      const auto from = part.in(x), grads = part.in(dy);
      const auto to = part.out(dx);
      const A *const means = given[1 + part.image], *const of_dz = sums.panel(part.image, 0);
      for (int64_t i = part.begin; i < part.end; i++) {
        const auto *p = from[i], *g = grads[i];
        auto* q = to[i];
        for_each_vector(part, [&](int64_t k, const auto& get, const auto& put) {
          const Vec<A> z = decomposed(part, get(p + k), given[0], means, i, k);
          const Vec<A> dz = get(g + k) * slope_of(z, act), mean_dz = of_channel(part, of_dz, i, k) * share_of_pixel;
          put(q + k, dz + of_channel(part, given[0], i, k) * (dz - mean_dz));
        });
      }
    });
  });
}

}  // namespace

extern const FeatureDecomposeOps feature_decompose_ops;
const FeatureDecomposeOps feature_decompose_ops = {means, forward, backward};

}  // namespace VOPS_ISA
}  // namespace vops
