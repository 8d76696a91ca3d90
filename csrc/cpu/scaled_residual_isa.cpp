#include "lines.h"
#include "scaled_residual.h"

namespace vops {
namespace VOPS_ISA {
namespace {

// Calls f(type of dy or y, type of b, whether lines are planes).
template <class A, class F>
void with_both_types(int dtype, int branch, bool planes, const F& f) {
  with_types<A>(branch, planes, [&](auto type, auto flag) {
    if constexpr (sizeof(type) == sizeof(A)) {
      f(type, type, flag);
    } else {
      dtype == branch ? f(type, type, flag) : f(float(), type, flag);
    }
  });
}

// Lines that do not run over images where every image has a factor of its own.
template <class... Tensors>
Error find_lines_of_images(Lines* lines, const Tensor4& s, const Tensor4& first, const Tensors&... rest) {
  const Error error = find_lines(lines, first, rest...);
  if (!error && s.data && !lines->planes) *lines = {false, first.size[0], first.size[2] * first.size[3], first.size[1]};
  return error;
}

// g and s in A, ones where they are absent.
template <class A>
struct Factors {
  const A *channel, *image;
  Factors(const Tensor4& g, const Tensor4& s, int64_t channels, int64_t images, A* memory)
      : channel(memory), image(memory + padded(channels)) {
    fill(g, channels, memory);
    fill(s, images, memory + padded(channels));
  }
  static int64_t size(int64_t channels, int64_t images) { return padded(channels) + padded(images); }
  static void fill(const Tensor4& t, int64_t count, A* to) {
    if (t.data) return pack_bias(t, {0, count}, to, kLanes);
    for (int64_t i = 0; i < padded(count); i++) to[i] = 1;
  }
};

template <class A>
Error run_forward(const Lines& lines, const Tensor4& x, const Tensor4& b, const Tensor4& g, const Tensor4& s,
                  const Tensor4& y) {
  const int64_t channels = x.size[1], images = s.data ? x.size[0] : lines.images;
  const int64_t count = lines.count(), tasks = min64(count, tasks_for_threads());
  const int64_t scratch = Factors<A>::size(channels, images);
  return for_each_task<A>(tasks, count * lines.length * kElementWork, scratch, [&](int64_t task, A* memory) {
    const Factors<A> factors(g, s, channels, images, memory);
    with_both_types<A>(x.dtype, b.dtype, lines.planes, [&](auto type, auto branch, auto planes) {
      typedef decltype(type) T;
      typedef decltype(branch) B;
      const Operand<const T> from(x, lines);
      const Operand<const B> added(b, lines);
      const Operand<T> to(y, lines);
      for_each_line(lines, task * count / tasks, (task + 1) * count / tasks, [&](int64_t n, int64_t i) {
        const T* px = from.at(n, i);
        const B* pb = added.at(n, i);
        T* py = to.at(n, i);
        const A scale = factors.image[n];
        for_each_vector(lines.length, [&](int64_t k, const auto& get, const auto& put) {
          const Vec<A> factor = scale * of_channel<A, decltype(planes)::value>(factors.channel, i, k);
          put(py + k, get(px + k) + factor * get(pb + k));
        });
      });
    });
  });
}

template <class A>
Error run_backward(const Lines& lines, const Tensor4& dy, const Tensor4& b, const Tensor4& g, const Tensor4& s,
                   const Tensor4& db, const Tensor4& dg) {
  const int64_t channels = dy.size[1], images = s.data ? dy.size[0] : lines.images;
  const PartialSums<A> sums = make_sums<A>(lines, channels);
  if (!sums.data) return kOutOfMemory;
  const int64_t scratch = Factors<A>::size(channels, images);
  const Error error = for_each_share(lines, sums, scratch, [&](A* part, int64_t begin, int64_t end, A* memory) {
    const Factors<A> factors(g, s, channels, images, memory);
    with_both_types<A>(dy.dtype, (dg.data ? b : db).dtype, lines.planes, [&](auto type, auto branch, auto planes) {
      typedef decltype(type) T;
      typedef decltype(branch) B;
      constexpr bool kPlanes = decltype(planes)::value;
      const Operand<const T> grads(dy, lines);
      const Operand<const B> from(dg.data ? b : db, lines);
      const Operand<B> to(db.data ? db : b, lines);
      for_each_line(lines, begin, end, [&](int64_t n, int64_t i) {
        const T* pg = grads.at(n, i);
        const B* pb = from.at(n, i);
        B* pdb = to.at(n, i);
        const A scale = factors.image[n];
        if (db.data) {
          for_each_vector(lines.length, [&](int64_t k, const auto& get, const auto& put) {
            put(pdb + k, scale * of_channel<A, kPlanes>(factors.channel, i, k) * get(pg + k));
          });
        }
        if (!dg.data) return;
        A* own = kPlanes ? part + n * sums.step + i : part;
        sum_line<A, kPlanes>(lines.length, own, [&](int64_t k, const auto& get, const auto&) {
          return scale * get(pg + k) * get(pb + k);
        });
      });
    });
  });
  if (!error && dg.data) sums.total(dg);
  return error;
}

Error forward(const Tensor4& x, const Tensor4& b, const Tensor4& g, const Tensor4& s, const Tensor4& y) {
  Lines lines;
  if (Error error = find_lines_of_images(&lines, s, x, b, y)) return error;
  return (x.dtype == kFloat64 ? run_forward<double> : run_forward<float>)(lines, x, b, g, s, y);
}
Error backward(const Tensor4& dy, const Tensor4& b, const Tensor4& g, const Tensor4& s, const Tensor4& db,
               const Tensor4& dg) {
  if (!db.data && !dg.data) return nullptr;
  Lines lines;
  if (Error error = find_lines_of_images(&lines, s, dy, dg.data ? b : dy, db.data ? db : dy)) return error;
  return (dy.dtype == kFloat64 ? run_backward<double> : run_backward<float>)(lines, dy, b, g, s, db, dg);
}

}  // namespace

extern const ScaledResidualOps scaled_residual_ops;
const ScaledResidualOps scaled_residual_ops = {forward, backward};

}  // namespace VOPS_ISA
}  // namespace vops
