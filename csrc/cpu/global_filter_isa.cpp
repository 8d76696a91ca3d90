// The transforms are products with the matrices of sines and cosines, for kLanes planes at a time: at the 14x14 and 7x7
// of the networks that takes a quarter of the time of calls of an FFT.
#include "global_filter.h"
#include "parallel.h"

namespace vops {
namespace VOPS_ISA {
namespace {

constexpr double kTwoPi = 6.283185307179586476925286766559;

// [inputs][outputs], of one of the four transforms. Inputs are real parts and then imaginary parts, where both exist.
template <class A>
struct Matrices {
  const A* rows;                         // real [W] -> real parts, then imaginary parts [2 * F]
  const A *columns_real, *columns_imag;  // [2 * H] -> [H]
  const A *inverse_real, *inverse_imag;  // [2 * H] -> [H]
  const A* inverse_rows;                 // [2 * F] -> real [W]
};

struct Size {
  int64_t height, width;
  int64_t frequencies() const { return width / 2 + 1; }
  int64_t matrix_elements() const { return 4 * width * frequencies() + 8 * height * height; }
  int64_t pixels() const { return height * width; }
  int64_t spectrum() const { return height * frequencies(); }
  // Multiply-adds that a plane takes, there and back.
  int64_t work() const { return 4 * height * width * frequencies() + 8 * height * spectrum(); }
};

// How often a frequency of a row counts in the result: for itself and for the mirror image that is not stored.
double multiplicity(int64_t frequency, int64_t width) { return frequency == 0 || 2 * frequency == width ? 1 : 2; }

template <class A>
Matrices<A> make_matrices(Size s, A* memory) {
  const int64_t h = s.height, w = s.width, f = s.frequencies();
  A *rows = memory, *columns_real = rows + 2 * w * f, *columns_imag = columns_real + 2 * h * h;
  A *inverse_real = columns_imag + 2 * h * h, *inverse_imag = inverse_real + 2 * h * h;
  A* inverse_rows = inverse_imag + 2 * h * h;
  for (int64_t j = 0; j < w; j++) {
    for (int64_t l = 0; l < f; l++) {
      const double angle = kTwoPi * (double)(j * l % w) / (double)w, weight = multiplicity(l, w) / (double)(h * w);
      rows[j * 2 * f + l] = (A)::cos(angle);
      rows[j * 2 * f + f + l] = (A) - ::sin(angle);
      inverse_rows[l * w + j] = (A)(weight * ::cos(angle));
      inverse_rows[(f + l) * w + j] = (A)(-weight * ::sin(angle));
    }
  }
  for (int64_t i = 0; i < h; i++) {
    for (int64_t k = 0; k < h; k++) {
      const double angle = kTwoPi * (double)(i * k % h) / (double)h;
      const A cosine = (A)::cos(angle), sine = (A)::sin(angle);
      const int64_t real = i * h + k, imag = (h + i) * h + k;
      columns_real[real] = inverse_real[real] = columns_imag[imag] = inverse_imag[imag] = cosine;
      columns_real[imag] = inverse_imag[real] = sine;
      columns_imag[real] = inverse_real[imag] = -sine;
    }
  }
  return {rows, columns_real, columns_imag, inverse_real, inverse_imag, inverse_rows};
}

// Vectors at equal steps.
template <class T>
struct Vectors {
  T* data;
  int64_t step, count;
};

template <int n, class A>
VOPS_INLINE void multiply_tile(const A* matrix, int64_t outputs, Vectors<const A> a, Vectors<const A> b, A* out,
                               int64_t out_step) {
  Vec<A> sum[n] = {};
  for (int64_t i = 0; i < a.count; i++, matrix += outputs) {
    const Vec<A> v = load(a.data + i * a.step);
    for (int o = 0; o < n; o++) sum[o] += v * matrix[o];
  }
  for (int64_t i = 0; i < b.count; i++, matrix += outputs) {
    const Vec<A> v = load(b.data + i * b.step);
    for (int o = 0; o < n; o++) sum[o] += v * matrix[o];
  }
  for (int o = 0; o < n; o++) store(out + o * out_step, sum[o]);
}

// out = matrix^T (a, b): the inputs are the vectors of a and then those of b.
template <class A>
void multiply(const A* matrix, Vectors<const A> a, Vectors<const A> b, Vectors<A> out) {
  for (int64_t o = 0; o < out.count; o += 8) {
    A* to = out.data + o * out.step;
    switch (min64(8, out.count - o)) {
#define VOPS_TILE(n)                                                \
  case n:                                                           \
    multiply_tile<n, A>(matrix + o, out.count, a, b, to, out.step); \
    break;
      VOPS_TILE(1)
      VOPS_TILE(2)
      VOPS_TILE(3)
      VOPS_TILE(4)
      VOPS_TILE(5)
      VOPS_TILE(6)
      VOPS_TILE(7)
      VOPS_TILE(8)
#undef VOPS_TILE
    }
  }
}

// A spectrum is [H][real parts, imaginary parts][F][lane].
template <class A>
struct Transforms {
  Size size;
  Matrices<A> matrices;
  int64_t spectrum_elements() const { return 2 * size.spectrum() * kLanes; }

  // Along the columns of a spectrum.
  void along_columns(const A* real_matrix, const A* imag_matrix, const A* in, A* out) const {
    const int64_t h = size.height, f = size.frequencies(), row = 2 * f * kLanes;
    for (int64_t l = 0; l < f; l++) {
      const Vectors<const A> real = {in + l * kLanes, row, h}, imag = {in + (f + l) * kLanes, row, h};
      multiply(real_matrix, real, imag, Vectors<A>{out + l * kLanes, row, h});
      multiply(imag_matrix, real, imag, Vectors<A>{out + (f + l) * kLanes, row, h});
    }
  }
  // plane [H][W][lane] -> spectrum, by way of `room` for another spectrum.
  void forward(const A* plane, A* room, A* spectrum) const {
    const int64_t w = size.width, f = size.frequencies();
    for (int64_t i = 0; i < size.height; i++) {
      const Vectors<const A> row = {plane + i * w * kLanes, kLanes, w};
      multiply(matrices.rows, row, {nullptr, 0, 0}, Vectors<A>{room + i * 2 * f * kLanes, kLanes, 2 * f});
    }
    along_columns(matrices.columns_real, matrices.columns_imag, room, spectrum);
  }
  void inverse(const A* spectrum, A* room, A* plane) const {
    const int64_t w = size.width, f = size.frequencies();
    along_columns(matrices.inverse_real, matrices.inverse_imag, spectrum, room);
    for (int64_t i = 0; i < size.height; i++) {
      const Vectors<const A> row = {room + i * 2 * f * kLanes, kLanes, 2 * f};
      multiply(matrices.inverse_rows, row, {nullptr, 0, 0}, Vectors<A>{plane + i * w * kLanes, kLanes, w});
    }
  }
  // Calls f(where the real part is, where the imaginary part is, where the weight's two are) for every frequency.
  template <class F>
  void for_each_frequency(const F& f) const {
    const int64_t count = size.frequencies();
    for (int64_t k = 0; k < size.height; k++) {
      const int64_t row = k * 2 * count * kLanes;
      for (int64_t l = 0; l < count; l++) f(l, row + l * kLanes, row + (count + l) * kLanes, row + 2 * l * kLanes);
    }
  }
};

int64_t after_matrices(Size size) { return ceil_div(size.matrix_elements(), kLanes) * kLanes; }

// The matrices belong to the calling thread, in front of what else the tasks share.
template <class A>
A* shared_memory(Size size, int64_t elements) {
  return (A*)thread_scratch(kSums, (after_matrices(size) + elements) * sizeof(A));
}

template <class A>
Error run_forward(const Tensor4& x, const Tensor4& w, const Tensor4& y) {
  const Size size = {x.size[2], x.size[3]};
  const int64_t batch = x.size[0], channels = x.size[1], blocks = ceil_div(channels, kLanes);
  A* memory = shared_memory<A>(size, 0);
  if (!memory) return kOutOfMemory;
  const Transforms<A> transforms = {size, make_matrices(size, memory)};
  const int64_t plane = size.pixels() * kLanes, spectrum = transforms.spectrum_elements();
  // Images share a block's weight: as many to a task as leave enough tasks.
  const int64_t groups = clamp64(ceil_div(tasks_for_threads(), blocks), 1, max64(batch, 1));
  const int64_t work = batch * channels * size.work();
  return for_each_task<A>(blocks * groups, work, plane + 3 * spectrum, [&](int64_t task, A* scratch) {
    const Channels c = channels_of_blocks(channels, task / groups, 1);
    const int64_t group = task % groups;
    A *pixels = scratch, *weight = pixels + plane, *first = weight + spectrum, *second = first + spectrum;
    pack_rows(w, 0, c, 0, size.height, weight, 0);
    for (int64_t n = group * batch / groups; n < (group + 1) * batch / groups; n++) {
      pack_rows(x, n, c, 0, size.height, pixels, 0);
      transforms.forward(pixels, first, second);
      transforms.for_each_frequency([&](int64_t, int64_t real, int64_t imag, int64_t at) {
        const Vec<A> re = load(second + real), im = load(second + imag);
        const Vec<A> w_re = load(weight + at), w_im = load(weight + at + kLanes);
        store(second + real, re * w_re - im * w_im);
        store(second + imag, re * w_im + im * w_re);
      });
      transforms.inverse(second, first, pixels);
      unpack_rows<A>(pixels, 0, y, n, c, 0, size.height);
    }
  });
}

// With X and G the spectra of x and dy: dx is the filter with conj(w) of dy, and dw is conj(X) * G, by the multiplicity
// of the frequency over H * W.
template <class A>
Error run_backward(const Tensor4& dy, const Tensor4& x, const Tensor4& w, const Tensor4& dx, const Tensor4& dw) {
  const Size size = {x.size[2], x.size[3]};
  const int64_t batch = x.size[0], channels = x.size[1], blocks = ceil_div(channels, kLanes);
  const int64_t plane = size.pixels() * kLanes, spectrum = 2 * size.spectrum() * kLanes;
  // Cut by shape only: every group of images has a sum of its own.
  const int64_t groups = clamp64(ceil_div(kFixedTasks, blocks), 1, max64(batch, 1));
  A* memory = shared_memory<A>(size, dw.data ? blocks * groups * spectrum : 0);
  if (!memory) return kOutOfMemory;
  const PartialSums<A> sums = {memory + after_matrices(size), groups, spectrum / kLanes};
  const Transforms<A> transforms = {size, make_matrices(size, memory)};
  const int64_t work = 2 * batch * channels * size.work();
  const Error error = for_each_task<A>(blocks * groups, work, plane + 4 * spectrum, [&](int64_t task, A* scratch) {
    const Channels c = channels_of_blocks(channels, task / groups, 1);
    const int64_t group = task % groups;
    A *pixels = scratch, *weight = pixels + plane, *room = weight + spectrum, *grad = room + spectrum;
    A *in = grad + spectrum, *own = sums.panel(0, task);
    if (dw.data) memset(own, 0, spectrum * sizeof(A));
    pack_rows(w, 0, c, 0, size.height, weight, 0);
    for (int64_t n = group * batch / groups; n < (group + 1) * batch / groups; n++) {
      pack_rows(dy, n, c, 0, size.height, pixels, 0);
      transforms.forward(pixels, room, grad);
      if (dw.data) {
        pack_rows(x, n, c, 0, size.height, pixels, 0);
        transforms.forward(pixels, room, in);
        transforms.for_each_frequency([&](int64_t, int64_t real, int64_t imag, int64_t at) {
          const Vec<A> re = load(grad + real), im = load(grad + imag);
          const Vec<A> in_re = load(in + real), in_im = load(in + imag);
          store(own + at, load(own + at) + (re * in_re + im * in_im));
          store(own + at + kLanes, load(own + at + kLanes) + (im * in_re - re * in_im));
        });
      }
      if (!dx.data) continue;
      transforms.for_each_frequency([&](int64_t, int64_t real, int64_t imag, int64_t at) {
        const Vec<A> re = load(grad + real), im = load(grad + imag);
        const Vec<A> w_re = load(weight + at), w_im = load(weight + at + kLanes);
        store(grad + real, re * w_re + im * w_im);
        store(grad + imag, im * w_re - re * w_im);
      });
      transforms.inverse(grad, room, pixels);
      unpack_rows<A>(pixels, 0, dx, n, c, 0, size.height);
    }
  });
  if (error || !dw.data) return error;
  for (int64_t block = 0; block < blocks; block++) {
    A* total = sums.total(block);
    transforms.for_each_frequency([&](int64_t l, int64_t, int64_t, int64_t at) {
      const A share = (A)(multiplicity(l, size.width) / (double)size.pixels());
      store(total + at, load(total + at) * share);
      store(total + at + kLanes, load(total + at + kLanes) * share);
    });
    unpack_rows<A>(total, 0, dw, 0, channels_of_blocks(channels, block, 1), 0, size.height);
  }
  return nullptr;
}

Error forward(const Tensor4& x, const Tensor4& w, const Tensor4& y) {
  return (x.dtype == kFloat64 ? run_forward<double> : run_forward<float>)(x, w, y);
}
Error backward(const Tensor4& dy, const Tensor4& x, const Tensor4& w, const Tensor4& dx, const Tensor4& dw) {
  return (x.dtype == kFloat64 ? run_backward<double> : run_backward<float>)(dy, x, w, dx, dw);
}

}  // namespace

extern const GlobalFilterOps global_filter_ops;
const GlobalFilterOps global_filter_ops = {forward, backward};

}  // namespace VOPS_ISA
}  // namespace vops
