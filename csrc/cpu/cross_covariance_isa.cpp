// A head has 12 to 96 channels, too few for a GEMM library to be fast. One small product in registers serves all
// passes: over the tokens for grams, over the channels else. It reads tiles of a few tokens, where they lie if their
// channels are neighbours of the type it computes in, as panels otherwise.
#include "cross_covariance.h"
#include "parallel.h"
#include "products.h"

namespace vops {
namespace VOPS_ISA {
namespace {

constexpr int64_t kTile = 32;          // tokens: panels of 96 channels fit the first-level cache
constexpr int64_t kLeastTokens = 256;  // of a partial sum

int64_t panel_size(int64_t channels) { return kTile * padded(channels); }

// Head h of sample b as an image of one row: its channels, its tokens.
Tensor4 head(const Tensor4& t, int64_t b, int64_t h, int64_t token, int64_t tokens) {
  const int64_t offset = b * t.stride[0] + h * t.stride[1] + token * t.stride[3];
  return {
      (char*)t.data + offset * size_of(t.dtype), t.dtype, {1, t.size[2], 1, tokens}, {0, t.stride[2], 0, t.stride[3]}};
}

// [block][token][lane], blocks kTile tokens apart; past the last token zeros, up to whole products.
template <class A>
void pack_tile(const Tensor4& t, int64_t b, int64_t h, int64_t token, int64_t tokens, A* panel) {
  const Tensor4 part = head(t, b, h, token, tokens);
  pack_rows(part, 0, {0, part.size[1]}, 0, 1, panel, kTile * kLanes);
  const int64_t end = ceil_div(tokens, kMostRows) * kMostRows;
  for (int64_t k = 0; k < blocks_of(part.size[1]) && tokens < end; k++) {
    memset(panel + (k * kTile + tokens) * kLanes, 0, (end - tokens) * kLanes * sizeof(A));
  }
}

// Some tokens of a head: vectors of channels, of a panel or of the tensor itself.
template <class A>
struct Lines {
  A* data;
  int64_t token, block;  // steps to the next token and to the next vector of channels
  A* at(int64_t t, int64_t channel) const { return data + t * token + channel / kLanes * block + channel % kLanes; }
};
template <class A>
Lines<A> panel_lines(A* panel) {
  return {panel, kLanes, kTile * kLanes};
}

template <class A>
bool has_lines(const Tensor4& t) {
  return t.stride[2] == 1 && t.dtype == (sizeof(A) == sizeof(double) ? kFloat64 : kFloat32);
}
template <class A>
Lines<A> tensor_lines(const Tensor4& t, int64_t b, int64_t h, int64_t token) {
  return {(A*)t.data + b * t.stride[0] + h * t.stride[1] + token * t.stride[3], t.stride[3], kLanes};
}

// For products over the tokens, which may read what lies between the channels of a head and those of the next token.
template <class A>
Lines<A> whole_lines(const Tensor4& t, int64_t b, int64_t h, int64_t token, int64_t tokens, A* panel) {
  const int64_t d = t.size[2];
  if (has_lines<A>(t) && t.stride[3] >= padded(d) - d && token + tokens < t.size[3]) {
    return tensor_lines<A>(t, b, h, token);
  }
  pack_tile(t, b, h, token, tokens, panel);
  return panel_lines(panel);
}

// gram[i][j] += the sum over the tokens of a_i b_j. The rows of the gram are padded(d) long. Sums of a tile are added
// as a whole: equal terms, one by one, would round all the same way.
template <class A>
void add_gram(const Lines<A>& a, const Lines<A>& b, int64_t tokens, int64_t d, A* gram) {
  const int64_t width = padded(d);
  for_each_product<A>(whole_rows(d), blocks_of(d), [&](auto rows, auto columns, int64_t i, int64_t j) {
    constexpr int kRows = decltype(rows)::value, kColumns = decltype(columns)::value;
    A* at = gram + i * width + j * kLanes;
    Vec<A> sum[kRows][kColumns] = {};
    multiply_add<A>(sum, a.at(0, i), 1, a.token, b.at(0, j * kLanes), b.token, b.block, tokens);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; c++) {
        A* to = at + r * width + c * kLanes;
        store(to, load(to) + sum[r][c]);
      }
    }
  });
}

template <class A>
void add_dots(const Lines<A>& a, const Lines<A>& b, int64_t tokens, int64_t d, A* dots) {
  for (int64_t k = 0; k < d; k += kLanes, dots += kLanes) {
    Vec<A> sum = {};
    for (int64_t t = 0; t < tokens; t++) sum += load(a.at(t, k)) * load(b.at(t, k));
    store(dots, load(dots) + sum);
  }
}

bool same_tokens(const Tensor4& a, const Tensor4& b) {
  bool same = a.data == b.data;
  for (int i = 0; i < 4; i++) same = same && a.stride[i] == b.stride[i];
  return same;
}

template <class A>
Error run_gram(const Tensor4& a, const Tensor4& b, const Tensor4& u, const Tensor4& v, const Tensor4& gram,
               const Tensor4& norms) {
  const int64_t batch = a.size[0], heads = a.size[1], d = a.size[2], tokens = a.size[3];
  const int64_t chunks = clamp64(tokens / kLeastTokens, 1, ceil_div(kFixedTasks, max64(batch, 1)));
  const int64_t width = padded(d), norms_at = whole_rows(d) * width, step = norms_at + 2 * width;
  const int64_t bytes = batch * heads * chunks * step * sizeof(A);
  const PartialSums<A> sums = {(A*)thread_scratch(kSums, max64(bytes, 1)), chunks, step / kLanes};
  if (!sums.data) return kOutOfMemory;
  memset(sums.data, 0, bytes);

  // Heads share cache lines, so a task takes several where there are tasks enough.
  const int64_t groups = clamp64(ceil_div(tasks_for_threads(), max64(batch * chunks, 1)), 1, heads);
  const int64_t size = panel_size(d), work = batch * heads * tokens * d * (d + 8);
  Error error = for_each_task<A>(batch * chunks * groups, work, 3 * size, [&](int64_t task, A* scratch) {
    const int64_t sample = task / groups / chunks, chunk = task / groups % chunks, group = task % groups;
    A *pa = scratch, *pb = pa + size, *other = pb + size;
    const int64_t end = (chunk + 1) * tokens / chunks;
    for (int64_t n = chunk * tokens / chunks; n < end; n += kTile) {
      const int64_t count = min64(kTile, end - n);
      for (int64_t h = group * heads / groups; h < (group + 1) * heads / groups; h++) {
        A* to = sums.panel(sample * heads + h, chunk);
        auto dots_with = [&](const Lines<A>& lines, const Tensor4& own, const Tensor4& with, A* dots) {
          const bool same = same_tokens(own, with);
          add_dots(lines, same ? lines : whole_lines(with, sample, h, n, count, other), count, d, dots);
        };
        const Lines<A> of_a = whole_lines(a, sample, h, n, count, pa), of_b = whole_lines(b, sample, h, n, count, pb);
        add_gram(of_a, of_b, count, d, to);
        if (norms.data) {
          dots_with(of_a, a, u, to + norms_at);
          dots_with(of_b, b, v, to + norms_at + width);
        }
      }
    }
  });
  if (error) return error;
  return for_each_task<A>(batch * heads, batch * chunks * heads * d * d, 0, [&](int64_t task, A*) {
    const int64_t sample = task / heads, h = task % heads;
    const A* total = sums.total(task);
    A* to = (A*)gram.data + task * d * d;
    for (int64_t i = 0; i < d; i++) memcpy(to + i * d, total + i * width, d * sizeof(A));
    for (int64_t side = 0; side < 2 && norms.data; side++) {
      memcpy((A*)norms.data + ((sample * 2 + side) * heads + h) * d, total + norms_at + side * width, d * sizeof(A));
    }
  });
}

VOPS_INLINE float square_root(float v) { return ::sqrtf(v); }
VOPS_INLINE double square_root(double v) { return ::sqrt(v); }

// What F.normalize divides by. The norms of a Gram form may come out below 0.
template <class A>
A norm_of(A square) {
  const A norm = square_root(square < 0 ? 0 : square);
  return norm < A(1e-12) ? A(1e-12) : norm;
}
template <class A>
bool is_bounded(A square) {
  return square < A(1e-24);
}

// A head's matrices, rows of d numbers, and its vectors.
template <class A>
struct Head {
  int64_t heads, d, sample, h;
  A* matrix(const Tensor4& t) const { return (A*)t.data + (sample * heads + h) * d * d; }
  A* vector(const Tensor4& t, int64_t side) const { return (A*)t.data + ((sample * 2 + side) * heads + h) * d; }
  A temperature(const Tensor4& t) const { return ((const A*)t.data)[h * t.stride[1]]; }
};
template <class A>
void invert_norms(const A* squares, int64_t d, A* inverses) {
  for (int64_t i = 0; i < d; i++) inverses[i] = 1 / norm_of(squares[i]);
}

template <class A>
Error run_softmax(const Tensor4& gram, const Tensor4& norms, const Tensor4& temperature, const Tensor4& weights) {
  const int64_t heads = gram.size[1], d = gram.size[2], tasks = gram.size[0] * heads, width = padded(d);
  return for_each_task<A>(tasks, tasks * d * d * 16, 2 * width, [&](int64_t task, A* scratch) {
    const Head<A> head = {heads, d, task / heads, task % heads};
    const A *g = head.matrix(gram), *q = head.vector(norms, 0), tau = head.temperature(temperature);
    A *w = head.matrix(weights), *inverse_k = scratch, *row = scratch + width;
    invert_norms(head.vector(norms, 1), d, inverse_k);
    for (int64_t i = 0; i < d; i++, g += d, w += d) {
      const A scale = tau / norm_of(q[i]);
      for_each_vector(
          d, [&](int64_t j, const auto& get, const auto&) { store(row + j, get(g + j) * get(inverse_k + j) * scale); });
      // Lanes past the end repeat a value, which leaves the maximum alone, until they are to add nothing.
      for (int64_t j = d; j < width; j++) row[j] = row[0];
      Vec<A> most = load(row), sums = {};
      for (int64_t j = kLanes; j < width; j += kLanes) most = load(row + j) > most ? load(row + j) : most;
      const A largest = largest_lane<A>(most);
      for (int64_t j = 0; j < width; j += kLanes) {
        store(row + j, exp(load(row + j) - largest));
      }
      for (int64_t j = d; j < width; j++) row[j] = 0;
      for (int64_t j = 0; j < width; j += kLanes) sums += load(row + j);
      const A inverse = 1 / sum_of_lanes<A>(sums);
      for_each_vector(d, [&](int64_t j, const auto&, const auto& put) { put(w + j, load(row + j) * inverse); });
    }
  });
}

// With c = gram / |q| / |k| and t the gradient of c: the gram's gradient is t / |q| / |k|, and that of the squared norm
// of q_i is -sum_j t_ij c_ij / (2 |q_i|^2), unless the norm is bounded.
template <class A>
Error run_softmax_backward(const Tensor4& grad, const Tensor4& weights, const Tensor4& gram, const Tensor4& norms,
                           const Tensor4& temperature, const Tensor4& scales, const Tensor4& dtemperature) {
  const int64_t heads = gram.size[1], d = gram.size[2], tasks = gram.size[0] * heads;
  return for_each_task<A>(tasks, tasks * d * d * 16, 2 * padded(d), [&](int64_t task, A* inverse_k) {
    const Head<A> head = {heads, d, task / heads, task % heads};
    const A *w = head.matrix(weights), *g = head.matrix(gram), tau = head.temperature(temperature);
    const A *q = head.vector(norms, 0), *k = head.vector(norms, 1);
    A *t = head.matrix(grad), *scale_q = head.vector(scales, 0), *scale_k = head.vector(scales, 1);
    A* of_k = inverse_k + padded(d);
    memset(of_k, 0, padded(d) * sizeof(A));
    invert_norms(k, d, inverse_k);
    A of_temperature = 0;
    for (int64_t i = 0; i < d; i++, w += d, g += d, t += d) {
      const A inverse_q = 1 / norm_of(q[i]);
      Vec<A> weighted = {}, products = {};
      for_each_vector(d, [&](int64_t j, const auto& get, const auto&) { weighted += get(t + j) * get(w + j); });
      const A mean = sum_of_lanes<A>(weighted);
      for_each_vector(d, [&](int64_t j, const auto& get, const auto& put) {
        const Vec<A> inverse = get(inverse_k + j) * inverse_q, logit = get(w + j) * (get(t + j) - mean);
        const Vec<A> product = logit * (get(g + j) * inverse);
        products += product;
        put(of_k + j, get(of_k + j) + product);
        put(t + j, logit * tau * inverse);
      });
      const A product = sum_of_lanes<A>(products);
      of_temperature += product;
      scale_q[i] = is_bounded(q[i]) ? 0 : -tau * product * inverse_q * inverse_q;
    }
    for (int64_t j = 0; j < d; j++) scale_k[j] = is_bounded(k[j]) ? 0 : -tau * of_k[j] * inverse_k[j] * inverse_k[j];
    ((A*)dtemperature.data)[task] = of_temperature;
  });
}

// y = the packed matrix, [block of y][channel of x][lane], times x, plus scale * z.
template <class A>
void multiply_tile(const A* matrix, const Lines<A>& x, const A* scale, const Lines<A>& z, int64_t tokens, int64_t d,
                   const Lines<A>& y) {
  for_each_product<A>(whole_rows(tokens), blocks_of(d), [&](auto rows, auto columns, int64_t i, int64_t j) {
    constexpr int kRows = decltype(rows)::value, kColumns = decltype(columns)::value;
    Vec<A> sum[kRows][kColumns] = {};
    for (int64_t k = 0; k < d; k += kLanes) {
      const A* with = matrix + (j * d + k) * kLanes;
      multiply_add<A>(sum, x.at(i, k), x.token, 1, with, kLanes, d * kLanes, min64(kLanes, d - k));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; c++) {
        const int64_t channel = (j + c) * kLanes;
        const int n = (int)min64(kLanes, d - channel);
        if (z.data) {
          const A* from = z.at(i + r, channel);
          sum[r][c] += load(scale + channel) * (n == kLanes ? load(from) : load_n(from, n));
        }
        A* to = y.at(i + r, channel);
        n == kLanes ? store(to, sum[r][c]) : store_n(to, sum[r][c], n);
      }
    }
  });
}

template <class A>
Error run_apply(const Tensor4& matrix, bool transposed, const Tensor4& x, const Tensor4& scale, const Tensor4& z,
                const Tensor4& y) {
  const int64_t batch = x.size[0], heads = x.size[1], d = x.size[2], tokens = x.size[3], size = panel_size(d);
  // Enough tokens for the packing of the matrix not to matter, and all heads of them, which share cache lines.
  const int64_t chunks = clamp64(ceil_div(tasks_for_threads(), max64(batch, 1)), 1, ceil_div(tokens, 2 * kTile));
  const int64_t of_head = padded(d) * (d + 1);
  return for_each_task<A>(
      batch * chunks, batch * heads * tokens * d * (d + 8), heads * of_head + 3 * size, [&](int64_t task, A* scratch) {
        const int64_t sample = task / chunks, chunk = task % chunks, end = (chunk + 1) * tokens / chunks;
        A *px = scratch + heads * of_head, *py = px + size, *pz = py + size;
        for (int64_t h = 0; h < heads; h++) {
          A *packed = scratch + h * of_head, *factors = packed + padded(d) * d;
          Tensor4 rows = head(matrix, sample, h, 0, d);
          if (transposed) rows.stride[1] = 1, rows.stride[3] = d;
          pack_rows(rows, 0, {0, d}, 0, 1, packed, d * kLanes);
          if (z.data) pack_rows(head(scale, sample, h, 0, 1), 0, {0, d}, 0, 1, factors, kLanes);
        }
        for (int64_t n = chunk * tokens / chunks; n < end; n += kTile) {
          const int64_t count = min64(kTile, end - n);
          for (int64_t h = 0; h < heads; h++) {
            const A *packed = scratch + h * of_head, *factors = packed + padded(d) * d;
            auto lines = [&](const Tensor4& t, A* panel) {
              if (whole_rows(count) == count && has_lines<A>(t)) return tensor_lines<A>(t, sample, h, n);
              if (panel != py) pack_tile(t, sample, h, n, count, panel);
              return panel_lines(panel);
            };
            const Lines<A> of_y = lines(y, py);
            multiply_tile(packed, lines(x, px), factors, z.data ? lines(z, pz) : Lines<A>{}, count, d, of_y);
            if (of_y.data == py) unpack_rows(py, kTile * kLanes, head(y, sample, h, n, count), 0, {0, d}, 0, 1);
          }
        }
      });
}

// In float64: as good as exact.
Error sum_tokens(const Tensor4& x, const Tensor4& sums, const Tensor4& centred) {
  const int64_t batch = x.size[0], channels = x.size[1], tokens = x.size[2], width = padded(channels);
  const int64_t chunks = clamp64(tokens / 32, 1, ceil_div(kFixedTasks, max64(batch, 1)));
  double* partial = (double*)thread_scratch(kSums, max64(batch * chunks * width, 1) * sizeof(double));
  if (!partial) return kOutOfMemory;
  const int64_t work = batch * tokens * channels;
  const auto rows_of = [&](const Tensor4& t, int64_t task, const auto& f) {
    const int64_t sample = task / chunks, chunk = task % chunks;
    for (int64_t n = chunk * tokens / chunks; n < (chunk + 1) * tokens / chunks; n++) {
      f((float*)t.data + sample * t.stride[0] + n * t.stride[2], n);
    }
  };
  Error error = for_each_task<double>(batch * chunks, work, 0, [&](int64_t task, double*) {
    double* total = partial + task * width;
    memset(total, 0, width * sizeof(double));
    rows_of(x, task, [&](const float* row, int64_t) {
      for_each_vector(channels, [&](int64_t c, const auto& get, const auto&) {
        store(total + c, load(total + c) + __builtin_convertvector(get(row + c), Double));
      });
    });
  });
  if (error) return error;
  return for_each_task<float>(batch * (centred.data ? chunks : 1), work, width, [&](int64_t task, float* mean) {
    const int64_t sample = centred.data ? task / chunks : task, chunk = centred.data ? task % chunks : 0;
    for (int64_t c = 0; c < channels; c += kLanes) {
      Double total = {};
      for (int64_t k = 0; k < chunks; k++) total += load(partial + (sample * chunks + k) * width + c);
      store(mean + c, __builtin_convertvector(total / (double)tokens, Float));
      const int64_t count = min64(kLanes, channels - c);
      if (chunk == 0) memcpy((double*)sums.data + sample * channels + c, &total, count * sizeof(double));
    }
    if (!centred.data) return;
    rows_of(x, task, [&](const float* row, int64_t n) {
      float* to = (float*)centred.data + sample * centred.stride[0] + n * centred.stride[2];
      for_each_vector(channels,
                      [&](int64_t c, const auto& get, const auto& put) { put(to + c, get(row + c) - load(mean + c)); });
    });
  });
}

Error gram(const Tensor4& a, const Tensor4& b, const Tensor4& u, const Tensor4& v, const Tensor4& gram,
           const Tensor4& norms) {
  return (gram.dtype == kFloat64 ? run_gram<double> : run_gram<float>)(a, b, u, v, gram, norms);
}
Error softmax(const Tensor4& gram, const Tensor4& norms, const Tensor4& temperature, const Tensor4& weights) {
  return (gram.dtype == kFloat64 ? run_softmax<double> : run_softmax<float>)(gram, norms, temperature, weights);
}
Error softmax_backward(const Tensor4& grad, const Tensor4& weights, const Tensor4& gram, const Tensor4& norms,
                       const Tensor4& temperature, const Tensor4& scales, const Tensor4& dtemperature) {
  return (gram.dtype == kFloat64 ? run_softmax_backward<double> : run_softmax_backward<float>)(grad, weights, gram,
                                                                                               norms, temperature,
                                                                                               scales, dtemperature);
}
Error apply(const Tensor4& matrix, bool transposed, const Tensor4& x, const Tensor4& scale, const Tensor4& z,
            const Tensor4& y) {
  return (matrix.dtype == kFloat64 ? run_apply<double> : run_apply<float>)(matrix, transposed, x, scale, z, y);
}

}  // namespace

extern const CrossCovarianceOps cross_covariance_ops;
const CrossCovarianceOps cross_covariance_ops = {gram, softmax, softmax_backward, apply, sum_tokens};

}  // namespace VOPS_ISA
}  // namespace vops
