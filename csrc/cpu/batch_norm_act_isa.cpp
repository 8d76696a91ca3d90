#include "batch_norm_act.h"
#include "gelu.h"
#include "lines.h"

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

// Images that stay apart: each has sums and gates of its own.
template <class... Tensors>
Error find_image_lines(Lines* lines, const Tensor4& first, const Tensors&... rest) {
  if (Error error = find_lines(lines, first, rest...)) return error;
  if (!lines->planes) *lines = {false, first.size[0], first.size[2] * first.size[3], first.size[1]};
  return nullptr;
}

// Rows of padded(channels) numbers in the memory of the calling thread: copies of coefficients, whose last vector is
// then whole, and partial sums.
template <class A>
struct Table {
  A* data;
  int64_t step;
  A* row(int64_t i) const { return data + i * step; }
};
template <class A>
Table<A> make_table(int64_t channels, int64_t rows) {
  const int64_t step = padded(channels), bytes = rows * step * sizeof(A);
  A* data = (A*)thread_scratch(kSums, bytes);
  if (data) memset(data, 0, bytes);
  return {data, step};
}
template <class A>
void copy_rows(const Table<A>& table, int64_t row, const Tensor4& from, int64_t rows, int64_t channels) {
  for (int64_t i = 0; i < rows && from.data; i++) {
    memcpy(table.row(row + i), (const A*)from.data + i * channels, channels * sizeof(A));
  }
}

// The coefficients of one image, and where they are in the table: those of the caller's table, but for its last row,
// then line, gate and offset.
template <class A>
struct Coefficients {
  const A *scale, *shift, *mean, *slope, *constant, *gate, *offset;
};
enum Row : int64_t { kScale, kShift, kMean, kInverse, kVariance, kSlope = kVariance, kConstant, kChannelRows };
VOPS_INLINE int64_t coefficient_rows(const BatchNormCoefficients& c, int64_t images) {
  return kChannelRows + ((c.gate.data ? images : 0) + (c.offset.data ? images : 0));
}
template <class A>
void fill_coefficients(const Table<A>& t, const BatchNormCoefficients& c, const Tensor4& line, int64_t images,
                       int64_t channels) {
  copy_rows(t, kScale, c.table, kVariance, channels);
  copy_rows(t, kSlope, line, 2, channels);
  copy_rows(t, kChannelRows, c.gate, images, channels);
  copy_rows(t, kChannelRows + (c.gate.data ? images : 0), c.offset, images, channels);
}
template <class A>
Coefficients<A> coefficients_of(const Table<A>& t, const BatchNormCoefficients& c, int64_t images, int64_t n) {
  const int64_t offsets = kChannelRows + (c.gate.data ? images : 0);
  return {t.row(kScale),
          t.row(kShift),
          t.row(kMean),
          t.row(kSlope),
          t.row(kConstant),
          c.gate.data ? t.row(kChannelRows + n) : nullptr,
          c.offset.data ? t.row(offsets + n) : nullptr};
}

// How images are cut for sums: by shape only. A plane's sums are whole, wherever planes are cut.
struct Shares {
  int64_t of_sums, tasks;  // shares of an image
};
Shares shares_of(const Lines& lines) {
  const int64_t images = max64(lines.images, 1), rows = max64(lines.per_image, 1);
  if (lines.planes) return {1, clamp64(ceil_div(tasks_for_threads(), images), 1, rows)};
  const int64_t shares = clamp64(lines.per_image / 32, 1, ceil_div(kFixedTasks, images));
  return {shares, shares};
}

// Calls body(type, whether lines are planes, image, first line, last line, share) in tasks.
template <class A, class Body>
Error for_each_share_of_images(const Lines& lines, int dtype, int64_t shares, int64_t work, const Body& body) {
  const int64_t total = lines.count() * lines.length * work;
  return for_each_task<A>(lines.images * shares, total, 1, [&](int64_t task, A*) {
    const int64_t n = task / shares, share = task % shares;
    with_types<A>(dtype, lines.planes, [&](auto type, auto planes) {
      body(type, planes, n, share * lines.per_image / shares, (share + 1) * lines.per_image / shares, share);
    });
  });
}

// Calls f(offset, how many vectors, load, store, keep) for a line; `keep` makes zeros of what is behind its end.
template <class F>
VOPS_INLINE void for_each_group(int64_t length, const F& f) {
  const auto get = [](const auto* p) { return load(p); };
  const auto put = [](auto* p, auto v) { store(p, v); };
  const auto all = [](auto v) { return v; };
  int64_t k = 0;
  for (; k + kJam * kLanes <= length; k += kJam * kLanes) f(k, Count<kJam>(), get, put, all);
  for (; k + kLanes <= length; k += kLanes) f(k, Count<1>(), get, put, all);
  const int n = (int)(length - k);
  if (n == 0) return;
  f(
      k, Count<1>(), [n](const auto* p) { return load_n(p, n); }, [n](auto* p, auto v) { store_n(p, v, n); },
      [n](auto v) {
        for (int lane = n; lane < kLanes; lane++) v[lane] = 0;
        return v;
      });
}

// z of a group, and dz, which is dy * gate + offset before.
template <class A, bool planes, int N>
struct Group {
  const Coefficients<A>& c;
  int64_t line, offset;
  Vec<A> of(const A* values, int j) const { return of_channel<A, planes>(values, line, offset + j * kLanes); }
  void normalize(const Vec<A> (&x)[N], Vec<A> (&z)[N]) const {
    for (int j = 0; j < N; j++) z[j] = of(c.scale, j) * x[j] + of(c.shift, j);
  }
  void gate(Vec<A> (&dy)[N]) const {
    for (int j = 0; c.gate && j < N; j++) dy[j] *= of(c.gate, j);
    for (int j = 0; c.offset && j < N; j++) dy[j] += of(c.offset, j);
  }
  void gradient(const Vec<A> (&x)[N], Vec<A> (&dy)[N], Vec<A> (&z)[N], Activation act) const {  // z: act(z)
    gate(dy);
    normalize(x, z);
    if (act == kNoActivation) return;
    Vec<A> slope[N];
    slopes(z, slope, act);
    for (int j = 0; j < N; j++) dy[j] *= slope[j];
  }
};

template <class A, bool planes, int N>
VOPS_INLINE void add_to(A* sums, int64_t offset, Vec<A> (&v)[N], Vec<A>& of_plane) {
  for (int j = 0; j < N; j++) {
    if constexpr (planes) of_plane += v[j];
    if constexpr (!planes) store(sums + offset + j * kLanes, load(sums + offset + j * kLanes) + v[j]);
  }
}

constexpr int64_t kActivationWork = 16;  // in multiply-adds

template <class A>
Error run_forward(const Lines& lines, const Tensor4& x, const BatchNormCoefficients& given, const Tensor4& y,
                  const Tensor4& means, Activation act) {
  const int64_t channels = x.size[1], images = lines.images, first = coefficient_rows(given, images);
  const Shares cut = shares_of(lines);
  const Table<A> table = make_table<A>(channels, first + (means.data ? images * cut.of_sums : 0));
  if (!table.data) return kOutOfMemory;
  fill_coefficients(table, given, Tensor4{}, images, channels);
  const Error error = for_each_share_of_images<A>(
      lines, x.dtype, cut.tasks, kActivationWork,
      [&](auto type, auto in_planes, int64_t n, int64_t begin, int64_t end, int64_t share) {
        typedef decltype(type) T;
        constexpr bool kPlanes = decltype(in_planes)::value;
        const Operand<const T> from(x, lines);
        const Operand<T> to(y, lines);
        const Coefficients<A> c = coefficients_of(table, given, images, n);
        A* own = means.data ? table.row(first + n * cut.of_sums + (kPlanes ? 0 : share)) : nullptr;
        for (int64_t i = begin; i < end; i++) {
          const T* p = from.at(n, i);
          T* q = to.at(n, i);
          Vec<A> of_plane = {};
          for_each_group(lines.length, [&](int64_t k, auto count, const auto& get, const auto& put, const auto& keep) {
            constexpr int N = decltype(count)::value;
            const Group<A, kPlanes, N> group = {c, i, k};
            Vec<A> v[N], z[N];
            for (int j = 0; j < N; j++) v[j] = get(p + k + j * kLanes);
            group.normalize(v, z);
            activate_group(z, act);
            for (int j = 0; j < N; j++) v[j] = keep(z[j]);
            if (own) add_to<A, kPlanes>(own, k, v, of_plane);
            for (int j = 0; j < N; j++) put(q + k + j * kLanes, z[j]);
          });
          if (kPlanes && own) own[i] += sum_of_lanes<A>(of_plane);
        }
      });
  if (error || !means.data) return error;
  for (int64_t n = 0; n < images; n++) {
    A *total = table.row(first + n * cut.of_sums), *out = (A*)means.data + n * channels;
    for (int64_t s = 1; s < cut.of_sums; s++) add_panel(total, total + s * table.step, table.step / kLanes);
    for (int64_t c = 0; c < channels; c++) out[c] = total[c] / (A)max64(x.size[2] * x.size[3], 1);
  }
  return nullptr;
}

// Of (parts, 2, C), or of (N, 5, C) with gates and offsets: what is dz in sum.
template <class A>
Error run_finish(const A* sums, int64_t parts, int64_t step, const BatchNormCoefficients& c, const BatchNormEnds& ends,
                 int64_t channels) {
  const int64_t padding = padded(channels);
  const Table<A> out = {(A*)thread_scratch(kPanels, 6 * padding * sizeof(A)), padding};
  if (!out.data) return kOutOfMemory;
  memset(out.data, 0, 6 * padding * sizeof(A));
  A *of_dz = out.row(0), *of_product = out.row(1);
  const A *gate = (const A*)c.gate.data, *offset = (const A*)c.offset.data;
  for (int64_t n = 0; n < parts; n++) {
    if (!offset) {
      const A* part = sums + n * 2 * step;
      for (int64_t k = 0; k < channels; k++) of_dz[k] += part[k], of_product[k] += part[step + k];
      continue;
    }
    const A *part = sums + (n * 5 + 1) * step, *g = gate + n * channels, *o = offset + n * channels;
    for (int64_t k = 0; k < channels; k++) {
      of_dz[k] += g[k] * part[k] + o[k] * part[step + k];
      of_product[k] += g[k] * part[2 * step + k] + o[k] * part[3 * step + k];
    }
  }
  const A *scale = (const A*)c.table.data, *inverse = scale + kInverse * channels;
  A *slope = out.row(2), *constant = out.row(3), *dweight = out.row(4), *dbias = out.row(5);
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

// kSums: 2, of dz and of dz * (x - mean), which are finished; or 5, which are written for every image.
template <class A, int kCount>
Error run_backward_sums(const Lines& lines, const Tensor4& dy, const Tensor4& x, const BatchNormCoefficients& given,
                        const Tensor4& y, const BatchNormEnds* ends, const Tensor4& sums, Activation act) {
  constexpr bool kByImage = kCount == 5;
  const int64_t channels = x.size[1], images = lines.images, first = coefficient_rows(given, images);
  const Shares cut = shares_of(lines);
  const int64_t parts = images * cut.of_sums;
  const Table<A> table = make_table<A>(channels, first + kCount * max64(parts, 1));
  if (!table.data) return kOutOfMemory;
  fill_coefficients(table, given, Tensor4{}, images, channels);
  const Error error = for_each_share_of_images<A>(
      lines, x.dtype, cut.tasks, kActivationWork,
      [&](auto type, auto in_planes, int64_t n, int64_t begin, int64_t end, int64_t share) {
        typedef decltype(type) T;
        constexpr bool kPlanes = decltype(in_planes)::value;
        const Operand<const T> from(x, lines), grads(dy, lines);
        const Operand<T> to(y.data ? y : x, lines);
        const Coefficients<A> c = coefficients_of(table, given, images, n);
        const Table<A> own = {table.row(first + kCount * (n * cut.of_sums + (kPlanes ? 0 : share))), table.step};
        for (int64_t i = begin; i < end; i++) {
          const T *p = from.at(n, i), *g = grads.at(n, i);
          T* q = to.at(n, i);
          Vec<A> plane[kCount] = {};
          for_each_group(lines.length, [&](int64_t k, auto count, const auto& get, const auto& put, const auto& keep) {
            constexpr int N = decltype(count)::value;
            const Group<A, kPlanes, N> group = {c, i, k};
            Vec<A> v[N], dz[N], z[N], term[kCount][N];
            for (int j = 0; j < N; j++) v[j] = get(p + k + j * kLanes), dz[j] = get(g + k + j * kLanes);
            if constexpr (kByImage) {
              Vec<A> slope[N];
              group.normalize(v, z);
              slopes(z, slope, act);
              for (int j = 0; j < N; j++) {
                const Vec<A> of_one = keep(slope[j]), difference = v[j] - group.of(c.mean, j);
                term[0][j] = keep(dz[j] * z[j]);
                term[1][j] = dz[j] * of_one;
                term[2][j] = of_one;
                term[3][j] = term[1][j] * difference;
                term[4][j] = of_one * difference;
              }
            } else {
              group.gradient(v, dz, z, act);
              for (int j = 0; j < N; j++) {
                term[0][j] = keep(dz[j]);
                term[1][j] = term[0][j] * (v[j] - group.of(c.mean, j));
              }
            }
            for (int s = 0; s < kCount; s++) add_to<A, kPlanes>(own.row(s), k, term[s], plane[s]);
            if (!y.data) return;
            for (int j = 0; j < N; j++) put(q + k + j * kLanes, c.gate ? z[j] * group.of(c.gate, j) : z[j]);
          });
          for (int s = 0; kPlanes && s < kCount; s++) own.row(s)[i] += sum_of_lanes<A>(plane[s]);
        }
      });
  if (error) return error;
  if (!kByImage) return run_finish(table.row(first), parts, table.step, {given.table, {}, {}}, *ends, channels);
  for (int64_t n = 0; n < images; n++) {
    A* total = table.row(first + kCount * n * cut.of_sums);
    for (int64_t s = 1; s < cut.of_sums; s++) {
      add_panel(total, total + s * kCount * table.step, kCount * table.step / kLanes);
    }
    for (int64_t s = 0; s < kCount; s++) {
      memcpy((A*)sums.data + (n * kCount + s) * channels, total + s * table.step, channels * sizeof(A));
    }
  }
  return nullptr;
}

template <class A>
Error run_backward_input(const Lines& lines, const Tensor4& dy, const Tensor4& x, const BatchNormCoefficients& given,
                         const Tensor4& line, const Tensor4& plus, const Tensor4& dx, Activation act) {
  const int64_t channels = x.size[1], images = lines.images;
  const Table<A> table = make_table<A>(channels, coefficient_rows(given, images));
  if (!table.data) return kOutOfMemory;
  fill_coefficients(table, given, line, images, channels);
  return for_each_share_of_images<A>(
      lines, x.dtype, shares_of(lines).tasks, kActivationWork,
      [&](auto type, auto in_planes, int64_t n, int64_t begin, int64_t end, int64_t) {
        typedef decltype(type) T;
        constexpr bool kPlanes = decltype(in_planes)::value;
        const Operand<const T> from(x, lines), grads(dy.data ? dy : x, lines), others(plus.data ? plus : x, lines);
        const Operand<T> to(dx, lines);
        const Coefficients<A> c = coefficients_of(table, given, images, n);
        for (int64_t i = begin; i < end; i++) {
          const T *p = from.at(n, i), *g = grads.at(n, i), *more = others.at(n, i);
          T* q = to.at(n, i);
          for_each_group(lines.length, [&](int64_t k, auto count, const auto& get, const auto& put, const auto&) {
            constexpr int N = decltype(count)::value;
            const Group<A, kPlanes, N> group = {c, i, k};
            Vec<A> v[N], dz[N], z[N];
            for (int j = 0; j < N; j++) v[j] = get(p + k + j * kLanes), dz[j] = get(g + k + j * kLanes);
            if (dy.data) group.gradient(v, dz, z, act);
            for (int j = 0; j < N; j++) {
              Vec<A> sum = group.of(c.slope, j) * (v[j] - group.of(c.mean, j)) + group.of(c.constant, j);
              if (dy.data) sum = group.of(c.scale, j) * dz[j] + sum;
              if (plus.data) sum += get(more + k + j * kLanes);
              put(q + k + j * kLanes, sum);
            }
          });
        }
      });
}

// Mean and sum of squared differences from it, of `count` numbers, together with those of `more` others.
template <class V, class A>
VOPS_INLINE void merge(V& mean, V& squares, A count, V other_mean, V other_squares, A more) {
  const V difference = other_mean - mean;
  mean += difference * (more / (count + more));
  squares += other_squares + difference * difference * (count * more / (count + more));
}

// Values of a channel that are summed before their mean is known: they stay in the first-level cache.
constexpr int64_t kMomentRows = 32, kMomentVectors = 64;

// Means and biased variances in the first two rows of what is returned, behind those of the parts.
template <class A>
Error run_moments(const Lines& lines, const Tensor4& x, Table<A>* found) {
  const int64_t channels = x.size[1], images = lines.images;
  const Shares cut = shares_of(lines);
  const int64_t parts = images * cut.of_sums, pixels = lines.planes ? lines.length : lines.per_image;
  const Table<A> table = *found = make_table<A>(channels, 2 * max64(parts, 1));
  if (!table.data) return kOutOfMemory;
  const Error error = for_each_share_of_images<A>(
      lines, x.dtype, cut.tasks, kElementWork,
      [&](auto type, auto in_planes, int64_t n, int64_t begin, int64_t end, int64_t share) {
        typedef decltype(type) T;
        constexpr bool kPlanes = decltype(in_planes)::value;
        const Operand<const T> from(x, lines);
        A *means = table.row(2 * (n * cut.of_sums + (kPlanes ? 0 : share))), *squares = means + table.step;
        if constexpr (kPlanes) {
          for (int64_t i = begin; i < end; i++) {
            for (int64_t first = 0; first < pixels; first += kMomentVectors * kLanes) {
              const T* p = from.at(n, i) + first;
              const int64_t length = min64(kMomentVectors * kLanes, pixels - first);
              Vec<A> sum = {}, square = {};
              for_each_group(length, [&](int64_t k, auto count, const auto& get, const auto&, const auto&) {
                for (int j = 0; j < decltype(count)::value; j++) sum += get(p + k + j * kLanes);
              });
              const A own = sum_of_lanes<A>(sum) / (A)length;
              for_each_group(length, [&](int64_t k, auto count, const auto& get, const auto&, const auto& keep) {
                for (int j = 0; j < decltype(count)::value; j++) {
                  const Vec<A> d = keep(get(p + k + j * kLanes) - own);
                  square += d * d;
                }
              });
              merge(means[i], squares[i], (A)first, own, sum_of_lanes<A>(square), (A)length);
            }
          }
        } else {
          for (int64_t first = begin; first < end; first += kMomentRows) {
            const int64_t rows = min64(kMomentRows, end - first);
            for_each_group(lines.length, [&](int64_t k, auto count, const auto& get, const auto&, const auto&) {
              constexpr int N = decltype(count)::value;
              Vec<A> own[N] = {}, square[N] = {};
              for (int64_t i = first; i < first + rows; i++) {
                const T* p = from.at(n, i) + k;
                for (int j = 0; j < N; j++) own[j] += get(p + j * kLanes);
              }
              for (int j = 0; j < N; j++) own[j] *= 1 / (A)rows;
              for (int64_t i = first; i < first + rows; i++) {
                const T* p = from.at(n, i) + k;
                for (int j = 0; j < N; j++) {
                  const Vec<A> d = get(p + j * kLanes) - own[j];
                  square[j] += d * d;
                }
              }
              for (int j = 0; j < N; j++) {
                A *m = means + k + j * kLanes, *s = squares + k + j * kLanes;
                Vec<A> merged = load(m), sum = load(s);
                merge(merged, sum, (A)(first - begin), own[j], square[j], (A)rows);
                store(m, merged);
                store(s, sum);
              }
            });
          }
        }
      });
  if (error) return error;
  A *means = table.row(0), *squares = table.row(1);
  A count = 0;
  for (int64_t part = 0; part < parts; part++) {
    const int64_t share = part % cut.of_sums, begin = share * lines.per_image / cut.of_sums;
    const A more = (A)(lines.planes ? pixels : (share + 1) * lines.per_image / cut.of_sums - begin);
    for (int64_t k = 0; part > 0 && k < table.step; k += kLanes) {
      Vec<A> merged = load(means + k), sum = load(squares + k);
      merge(merged, sum, count, (Vec<A>)load(table.row(2 * part) + k), (Vec<A>)load(table.row(2 * part + 1) + k), more);
      store(means + k, merged);
      store(squares + k, sum);
    }
    count += more;
  }
  for (int64_t c = 0; c < channels; c++) squares[c] /= count == 0 ? 1 : count;
  return nullptr;
}

template <class A>
Error run_prepare(const Tensor4& x, const Tensor4& weight, const Tensor4& bias, const Tensor4& mean,
                  const Tensor4& variance, const Tensor4& table, double eps) {
  const int64_t channels = weight.size[1];
  const Channels all = {0, channels};
  A count = 0;
  Table<A> moments = {};
  if (x.data) {
    Lines lines;
    if (Error error = find_image_lines(&lines, x)) return error;
    if (Error error = run_moments(lines, x, &moments)) return error;
    count = (A)(x.size[0] * x.size[2] * x.size[3]);
  } else {
    moments = make_table<A>(channels, 2);
    if (!moments.data) return kOutOfMemory;
    pack_rows<A>(mean, 0, all, 0, 1, moments.row(0), kLanes);
    pack_rows<A>(variance, 0, all, 0, 1, moments.row(1), kLanes);
  }
  const Table<A> given = {(A*)thread_scratch(kPanels, 2 * moments.step * sizeof(A)), moments.step};
  if (!given.data) return kOutOfMemory;
  pack_rows<A>(weight, 0, all, 0, 1, given.row(0), kLanes);
  pack_rows<A>(bias, 0, all, 0, 1, given.row(1), kLanes);
  const A correction = count > 1 ? count / (count - 1) : 1;
  A* const out = (A*)table.data;
  for (int64_t c = 0; c < channels; c++) {
    const A own_mean = moments.row(0)[c], own_variance = moments.row(1)[c];
    const A inverse = 1 / (A)__builtin_sqrt((double)(own_variance + (A)eps)), scale = given.row(0)[c] * inverse;
    out[kScale * channels + c] = scale;
    out[kShift * channels + c] = given.row(1)[c] - scale * own_mean;
    out[kMean * channels + c] = own_mean;
    out[kInverse * channels + c] = inverse;
    out[kVariance * channels + c] = own_variance * correction;
  }
  return nullptr;
}

bool is_double(const Tensor4& t) { return t.dtype == kFloat64; }

Error prepare(const Tensor4& x, const Tensor4& weight, const Tensor4& bias, const Tensor4& mean,
              const Tensor4& variance, const Tensor4& table, double eps) {
  return (is_double(table) ? run_prepare<double> : run_prepare<float>)(x, weight, bias, mean, variance, table, eps);
}
Error forward(const Tensor4& x, const BatchNormCoefficients& c, const Tensor4& y, const Tensor4& means,
              Activation act) {
  Lines lines;
  if (Error error = find_image_lines(&lines, x, y)) return error;
  return (is_double(x) ? run_forward<double> : run_forward<float>)(lines, x, c, y, means, act);
}
Error backward_sums(const Tensor4& dy, const Tensor4& x, const BatchNormCoefficients& c, const Tensor4& y,
                    const BatchNormEnds& ends, Activation act) {
  Lines lines;
  if (Error error = find_image_lines(&lines, x, dy, y.data ? y : x)) return error;
  const auto run = is_double(x) ? run_backward_sums<double, 2> : run_backward_sums<float, 2>;
  return run(lines, dy, x, c, y, &ends, {}, act);
}
Error backward_images(const Tensor4& dy, const Tensor4& x, const BatchNormCoefficients& c, const Tensor4& y,
                      const Tensor4& sums, Activation act) {
  Lines lines;
  if (Error error = find_image_lines(&lines, x, dy, y.data ? y : x)) return error;
  const auto run = is_double(x) ? run_backward_sums<double, 5> : run_backward_sums<float, 5>;
  return run(lines, dy, x, c, y, nullptr, sums, act);
}
template <class A>
Error finish_of(const Tensor4& sums, const BatchNormCoefficients& c, const BatchNormEnds& ends) {
  const int64_t channels = c.table.size[1];
  return run_finish((const A*)sums.data, sums.size[0], channels, c, ends, channels);
}
Error finish(const Tensor4& sums, const BatchNormCoefficients& c, const BatchNormEnds& ends) {
  return (is_double(sums) ? finish_of<double> : finish_of<float>)(sums, c, ends);
}
Error backward_input(const Tensor4& dy, const Tensor4& x, const BatchNormCoefficients& c, const Tensor4& line,
                     const Tensor4& plus, const Tensor4& dx, Activation act) {
  Lines lines;
  if (Error error = find_image_lines(&lines, x, dy.data ? dy : x, plus.data ? plus : x, dx)) return error;
  return (is_double(x) ? run_backward_input<double> : run_backward_input<float>)(lines, dy, x, c, line, plus, dx, act);
}

}  // namespace

extern const BatchNormActOps batch_norm_act_ops;
const BatchNormActOps batch_norm_act_ops = {prepare, forward, backward_sums, backward_images, finish, backward_input};

}  // namespace VOPS_ISA
}  // namespace vops
