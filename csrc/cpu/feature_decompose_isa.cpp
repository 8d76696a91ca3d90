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

// Lines of images that stay apart: each has means of its own.
template <class... Tensors>
Error find_image_lines(Lines* lines, const Tensor4& first, const Tensors&... rest) {
  if (Error error = find_lines(lines, first, rest...)) return error;
  if (!lines->planes) *lines = {false, first.size[0], first.size[2] * first.size[3], first.size[1]};
  return nullptr;
}

// Sums over the pixels of every image in two stages, cut by shape only: [image][share][sum][channel].
template <class A>
struct ImageSums {
  A* data;
  int64_t shares, count, step;
  A* part(int64_t image, int64_t share, int64_t sum) const {
    return data + ((image * shares + share) * count + sum) * step;
  }
};
template <class A>
ImageSums<A> make_image_sums(const Lines& lines, int64_t channels, int64_t count) {
  const int64_t wanted = ceil_div(kFixedTasks, max64(lines.images, 1));
  const int64_t shares = lines.planes ? 1 : clamp64(lines.per_image / 64, 1, wanted), step = padded(channels);
  const int64_t bytes = max64(lines.images, 1) * shares * count * step * sizeof(A);
  A* data = (A*)thread_scratch(kSums, bytes);
  if (data) memset(data, 0, bytes);
  return {data, shares, count, step};
}

// Means and sigma of one image for the vectors of its lines.
template <class A>
struct Coefficients {
  A *sigma, *mean;
};
constexpr int64_t kScratchRows = 2;

template <class A, bool planes>
VOPS_INLINE Vec<A> decomposed(Vec<A> x, const Coefficients<A>& c, int64_t line, int64_t offset) {
  return x + of_channel<A, planes>(c.sigma, line, offset) * (x - of_channel<A, planes>(c.mean, line, offset));
}

// Calls body(type, planes, image, first line, last line, share, coefficients) in tasks.
template <class A, class Body>
VOPS_INLINE Error for_each_image_share(const Lines& lines, const Tensor4& x, const Tensor4& mean, const Tensor4& sigma,
                                       int64_t shares, const Body& body) {
  const int64_t step = padded(x.size[1]), work = lines.count() * lines.length * kElementWork * 4;
  const int64_t tasks = lines.images * shares;
  return for_each_task<A>(tasks, work, kScratchRows * step, [&](int64_t task, A* data) {
    const int64_t n = task / shares, share = task % shares;
    const Coefficients<A> c = {data, data + step};
    if (mean.data) {
      pack_bias(sigma, {0, x.size[1]}, c.sigma, kLanes);
      memcpy(c.mean, (const A*)mean.data + n * x.size[1], x.size[1] * sizeof(A));
      memset(c.mean + x.size[1], 0, (step - x.size[1]) * sizeof(A));
    }
    with_types<A>(x.dtype, lines.planes, [&](auto type, auto planes) {
      body(type, planes, n, share * lines.per_image / shares, (share + 1) * lines.per_image / shares, share, c);
    });
  });
}

// Shares of an image for passes without sums: all threads are busy to the end.
int64_t shares_for_threads(const Lines& lines) {
  return clamp64(ceil_div(tasks_for_threads(), max64(lines.images, 1)), 1, max64(lines.per_image, 1));
}

template <class A>
Error run_means(const Lines& lines, const Tensor4& x, const Tensor4& mean) {
  const ImageSums<A> sums = make_image_sums<A>(lines, x.size[1], 1);
  if (!sums.data) return kOutOfMemory;
  const int64_t shares = lines.planes ? shares_for_threads(lines) : sums.shares;
  const Error error = for_each_image_share<A>(
      lines, x, {}, {}, shares,
      [&](auto type, auto planes, int64_t n, int64_t begin, int64_t end, int64_t share, const Coefficients<A>&) {
        typedef decltype(type) T;
        constexpr bool kPlanes = decltype(planes)::value;
        const Operand<const T> from(x, lines);
        for (int64_t i = begin; i < end; i++) {
          const T* p = from.at(n, i);
          A* own = kPlanes ? sums.part(n, 0, 0) + i : sums.part(n, share, 0);
          sum_line<A, kPlanes>(lines.length, own, [&](int64_t k, const auto& get, const auto&) { return get(p + k); });
        }
      });
  if (error) return error;
  const A pixels = (A)(x.size[2] * x.size[3]);
  for (int64_t n = 0; n < lines.images; n++) {
    for (int64_t s = 1; s < sums.shares; s++) add_panel(sums.part(n, 0, 0), sums.part(n, s, 0), sums.step / kLanes);
    A* to = (A*)mean.data + n * x.size[1];
    for (int64_t c = 0; c < x.size[1]; c++) to[c] = sums.part(n, 0, 0)[c] / pixels;
  }
  return nullptr;
}

template <class A>
Error run_forward(const Lines& lines, const Tensor4& x, const Tensor4& mean, const Tensor4& sigma, const Tensor4& y,
                  Activation act) {
  return for_each_image_share<A>(
      lines, x, mean, sigma, shares_for_threads(lines),
      [&](auto type, auto planes, int64_t n, int64_t begin, int64_t end, int64_t, const Coefficients<A>& c) {
        typedef decltype(type) T;
        constexpr bool kPlanes = decltype(planes)::value;
        const Operand<const T> from(x, lines);
        const Operand<T> to(y, lines);
        for (int64_t i = begin; i < end; i++) {
          const T* p = from.at(n, i);
          T* q = to.at(n, i);
          for_each_vector(lines.length, [&](int64_t k, const auto& get, const auto& put) {
            put(q + k, act_of(decomposed<A, kPlanes>(get(p + k), c, i, k), act));
          });
        }
      });
}

// With z = x + sigma * (x - mean) and dz = dy * act'(z): dsigma = sum of dz * (x - mean), and
// dx = (1 + sigma) * dz - sigma * mean of dz.
template <class A>
Error run_backward(const Lines& lines, const Tensor4& dy, const Tensor4& x, const Tensor4& mean, const Tensor4& sigma,
                   const Tensor4& dx, const Tensor4& dsigma, Activation act) {
  const int64_t channels = x.size[1];
  const ImageSums<A> sums = make_image_sums<A>(lines, channels, 2);
  if (!sums.data) return kOutOfMemory;
  const int64_t shares = lines.planes ? shares_for_threads(lines) : sums.shares;
  Error error = for_each_image_share<A>(
      lines, x, mean, sigma, shares,
      [&](auto type, auto planes, int64_t n, int64_t begin, int64_t end, int64_t share, const Coefficients<A>& c) {
        typedef decltype(type) T;
        constexpr bool kPlanes = decltype(planes)::value;
        const Operand<const T> from(x, lines), grads(dy, lines);
        for (int64_t i = begin; i < end; i++) {
          const T *p = from.at(n, i), *g = grads.at(n, i);
          A* of_dz = kPlanes ? sums.part(n, 0, 0) + i : sums.part(n, share, 0);
          A* of_product = kPlanes ? sums.part(n, 0, 1) + i : sums.part(n, share, 1);
          Vec<A> plane_sum = {};
          sum_line<A, kPlanes>(lines.length, of_dz, [&](int64_t k, const auto& get, const auto&) {
            const Vec<A> v = get(p + k), dz = get(g + k) * slope_of(decomposed<A, kPlanes>(v, c, i, k), act);
            const Vec<A> product = dz * (v - of_channel<A, kPlanes>(c.mean, i, k));
            if constexpr (kPlanes) plane_sum += product;
            if constexpr (!kPlanes) store(of_product + k, load(of_product + k) + product);
            return dz;
          });
          if constexpr (kPlanes) *of_product += sum_of_lanes<A>(plane_sum);
        }
      });
  if (error) return error;
  for (int64_t n = 0; n < lines.images; n++) {
    for (int64_t s = 1; s < sums.shares; s++) {
      for (int64_t k = 0; k < 2; k++) add_panel(sums.part(n, 0, k), sums.part(n, s, k), sums.step / kLanes);
    }
    if (n > 0) add_panel(sums.part(0, 0, 1), sums.part(n, 0, 1), sums.step / kLanes);
  }
  if (dsigma.data) unpack_rows<A>(sums.part(0, 0, 1), kLanes, dsigma, 0, {0, channels}, 0, 1);
  if (!dx.data) return nullptr;
  const A share_of_pixel = 1 / (A)(x.size[2] * x.size[3]);
  return for_each_image_share<A>(
      lines, x, mean, sigma, shares_for_threads(lines),
      [&](auto type, auto planes, int64_t n, int64_t begin, int64_t end, int64_t, const Coefficients<A>& c) {
        typedef decltype(type) T;
        constexpr bool kPlanes = decltype(planes)::value;
        const Operand<const T> from(x, lines), grads(dy, lines);
        const Operand<T> to(dx, lines);
        const A* of_dz = sums.part(n, 0, 0);
        for (int64_t i = begin; i < end; i++) {
          const T *p = from.at(n, i), *g = grads.at(n, i);
          T* q = to.at(n, i);
          for_each_vector(lines.length, [&](int64_t k, const auto& get, const auto& put) {
            const Vec<A> dz = get(g + k) * slope_of(decomposed<A, kPlanes>(get(p + k), c, i, k), act);
            const Vec<A> mean_dz = of_channel<A, kPlanes>(of_dz, i, k) * share_of_pixel;
            put(q + k, dz + of_channel<A, kPlanes>(c.sigma, i, k) * (dz - mean_dz));
          });
        }
      });
}

Error means(const Tensor4& x, const Tensor4& mean) {
  Lines lines;
  if (Error error = find_image_lines(&lines, x)) return error;
  return (x.dtype == kFloat64 ? run_means<double> : run_means<float>)(lines, x, mean);
}
Error forward(const Tensor4& x, const Tensor4& mean, const Tensor4& sigma, const Tensor4& y, Activation act) {
  Lines lines;
  if (Error error = find_image_lines(&lines, x, y)) return error;
  return (x.dtype == kFloat64 ? run_forward<double> : run_forward<float>)(lines, x, mean, sigma, y, act);
}
Error backward(const Tensor4& dy, const Tensor4& x, const Tensor4& mean, const Tensor4& sigma, const Tensor4& dx,
               const Tensor4& dsigma, Activation act) {
  Lines lines;
  if (Error error = find_image_lines(&lines, dy, x, dx.data ? dx : x)) return error;
  return (x.dtype == kFloat64 ? run_backward<double> : run_backward<float>)(lines, dy, x, mean, sigma, dx, dsigma, act);
}

}  // namespace

extern const FeatureDecomposeOps feature_decompose_ops;
const FeatureDecomposeOps feature_decompose_ops = {means, forward, backward};

}  // namespace VOPS_ISA
}  // namespace vops
