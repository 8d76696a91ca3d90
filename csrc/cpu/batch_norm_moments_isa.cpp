// Mean and variance over images and pixels: those of some pixels at a time, merged.
#include "batch_norm_lines.h"

namespace vops {
namespace VOPS_ISA {
namespace {

// Mean and sum of squared differences from it, of `count` numbers, together with those of `more` others.
template <class V, class A>
VOPS_INLINE void merge(V& mean, V& squares, A count, V other_mean, V other_squares, A more) {
  const V difference = other_mean - mean;
  mean += difference * (more / (count + more));
  squares += other_squares + difference * difference * (count * more / (count + more));
}

// Values of a channel that are summed before their mean is known: they stay in the first-level cache.
constexpr int64_t kMomentRows = 32, kMomentVectors = 64;

template <class T, class A, bool planes>
VOPS_INLINE void merge_plane(const Part<T, A, planes>& part, const T* plane, A& mean, A& squares) {
  for (int64_t first = 0; first < part.lines.length; first += kMomentVectors * kLanes) {
    const T* p = plane + first;
    const int64_t length = min64(kMomentVectors * kLanes, part.lines.length - first);
    Vec<A> sum = {}, square = {};
    for_each_group<kJam>(part, length, [&](int64_t k, auto count, const auto& get, const auto&, const auto&) {
      for (int j = 0; j < decltype(count)::value; j++) sum += get(p + k + j * kLanes);
    });
    const A own = sum_of_lanes<A>(sum) / (A)length;
    for_each_group<kJam>(part, length, [&](int64_t k, auto count, const auto& get, const auto&, const auto& keep) {
      for (int j = 0; j < decltype(count)::value; j++) {
        const Vec<A> d = keep(get(p + k + j * kLanes) - own);
        square += d * d;
      }
    });
    merge(mean, squares, (A)first, own, sum_of_lanes<A>(square), (A)length);
  }
}

template <class T, class A, bool planes>
VOPS_INLINE void merge_rows(const Part<T, A, planes>& part, const Operand<const T>& from, A* means, A* squares) {
  for (int64_t first = part.begin; first < part.end; first += kMomentRows) {
    const int64_t rows = min64(kMomentRows, part.end - first);
    for_each_group<kJam>(part, part.lines.length,
                         [&](int64_t k, auto count, const auto& get, const auto&, const auto&) {
                           constexpr int N = decltype(count)::value;
                           Vec<A> own[N] = {}, square[N] = {};
                           for (int64_t i = first; i < first + rows; i++) {
                             const T* p = from[i] + k;
                             for (int j = 0; j < N; j++) own[j] += get(p + j * kLanes);
                           }
                           for (int j = 0; j < N; j++) own[j] *= 1 / (A)rows;
                           for (int64_t i = first; i < first + rows; i++) {
                             const T* p = from[i] + k;
                             for (int j = 0; j < N; j++) {
                               const Vec<A> d = get(p + j * kLanes) - own[j];
                               square[j] += d * d;
                             }
                           }
                           for (int j = 0; j < N; j++) {
                             A *m = means + k + j * kLanes, *s = squares + k + j * kLanes;
                             Vec<A> merged = load(m), sum = load(s);
                             merge(merged, sum, (A)(first - part.begin), own[j], square[j], (A)rows);
                             store(m, merged);
                             store(s, sum);
                           }
                         });
  }
}

}  // namespace

Error batch_norm_moments(const Tensor4& x, const Tensor4& mean, const Tensor4& variance) {
  Lines lines;
  if (Error error = find_image_lines(&lines, x)) return error;
  return with_sum_type(x.dtype, [&](auto zero) {
    typedef decltype(zero) A;
    const int64_t channels = x.size[1], step = padded(channels);
    const PartialSums<A> sums = make_sums<A>(lines, channels, 2);
    if (!sums.data) return kOutOfMemory;
    const Error error = for_each_part<A>(lines, x.dtype, sums, kElementWork, [&](auto part) {
      const auto from = part.in(x);
      A* const means = own_sums(part, sums);
      if (!part.planes()) return merge_rows(part, from, means, means + step);
      for (int64_t i = part.begin; i < part.end; i++) merge_plane(part, from[i], means[i], means[step + i]);
    });
    if (error) return error;
    A *means = sums.data, *squares = means + step, count = 0;
    for (int64_t part = 0; part < lines.images * sums.splits; part++) {
      const int64_t share = part % sums.splits, begin = share * lines.per_image / sums.splits;
      const A more = (A)(lines.planes ? lines.length : (share + 1) * lines.per_image / sums.splits - begin);
      const A *others = sums.panel(0, part), *their_squares = others + step;
      for (int64_t k = 0; part > 0 && k < step; k += kLanes) {
        Vec<A> merged = load(means + k), sum = load(squares + k);
        merge(merged, sum, count, (Vec<A>)load(others + k), (Vec<A>)load(their_squares + k), more);
        store(means + k, merged);
        store(squares + k, sum);
      }
      count += more;
    }
    for (int64_t c = 0; c < channels; c++) squares[c] /= count;
    memcpy(mean.data, means, channels * sizeof(A));
    memcpy(variance.data, squares, channels * sizeof(A));
    return error;
  });
}

}  // namespace VOPS_ISA
}  // namespace vops
