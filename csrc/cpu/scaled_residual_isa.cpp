#include "lines.h"
#include "scaled_residual.h"

namespace vops {
namespace VOPS_ISA {
namespace {

// Parts are of the type of the branch; calls f(type of the residual stream), which may be float beside a half type.
template <class T, class F>
void with_stream_type(int dtype, int branch, const F& f) {
  if constexpr (sizeof(T) == 2) {
    dtype == branch ? f(T()) : f(float());
  } else {
    f(T());
  }
}

// Where every image has a factor of its own, images stay apart.
template <class... Tensors>
Error find_scaled_lines(Lines* lines, const Tensor4& s, const Tensors&... tensors) {
  return s.data ? find_image_lines(lines, tensors...) : find_lines(lines, tensors...);
}

// g of the channels, and s of the images: ones where they are absent.
template <class A>
ChannelRows<A> make_factors(const Tensor4& g, const Tensor4& s, int64_t channels, int64_t images) {
  const ChannelRows<A> factors = make_coefficients<A>(max64(channels, images), 2);
  auto fill = [&](const Tensor4& t, int64_t count, A* to) {
    if (t.data) return pack_bias(t, {0, count}, to, kLanes);
    for (int64_t i = 0; i < padded(count); i++) to[i] = 1;
  };
  if (factors.data) fill(g, channels, factors[0]), fill(s, images, factors[1]);
  return factors;
}

Error forward(const Tensor4& x, const Tensor4& b, const Tensor4& g, const Tensor4& s, const Tensor4& y) {
  Lines lines;
  if (Error error = find_scaled_lines(&lines, s, x, b, y)) return error;
  return with_sum_type(x.dtype, [&](auto zero) {
    typedef decltype(zero) A;
    const ChannelRows<A> factors = make_factors<A>(g, s, x.size[1], x.size[0]);
    if (!factors.data) return kOutOfMemory;
    return for_each_part<A>(lines, b.dtype, kElementWork, [&](auto part) {
      with_stream_type<typename decltype(part)::T>(x.dtype, b.dtype, [&](auto type) {
        typedef decltype(type) T;
        const auto branch = part.in(b);
        const auto from = part.template operand<const T>(x);
        const auto to = part.template operand<T>(y);
        const A scale = factors[1][part.image], *const channels = factors[0];
        for (int64_t i = part.begin; i < part.end; i++) {
          const auto* pb = branch[i];
          const T* px = from[i];
          T* py = to[i];
          for_each_vector(part, [&](int64_t k, const auto& get, const auto& put) {
            const Vec<A> factor = scale * of_channel(part, channels, i, k);
            put(py + k, get(px + k) + factor * get(pb + k));
          });
        }
      });
    });
  });
}

Error backward(const Tensor4& dy, const Tensor4& b, const Tensor4& g, const Tensor4& s, const Tensor4& db,
               const Tensor4& dg) {
  if (!db.data && !dg.data) return nullptr;
  Lines lines;
  if (Error error = find_scaled_lines(&lines, s, dy, dg.data ? b : dy, db.data ? db : dy)) return error;
  const int dtype = (dg.data ? b : db).dtype;
  return with_sum_type(dy.dtype, [&](auto zero) {
    typedef decltype(zero) A;
    const ChannelRows<A> factors = make_factors<A>(g, s, dy.size[1], dy.size[0]);
    const PartialSums<A> sums = make_sums<A>(lines, dy.size[1], 1);
    if (!factors.data || !sums.data) return kOutOfMemory;
    const Error error = for_each_part<A>(lines, dtype, sums, kElementWork, [&](auto part) {
      with_stream_type<typename decltype(part)::T>(dy.dtype, dtype, [&](auto type) {
        const auto grads = part.template operand<const decltype(type)>(dy);
        const auto branch = part.in(b);
        const auto to = part.out(db);
        const A scale = factors[1][part.image], *const channels = factors[0];
        A* const own = dg.data ? own_sums(part, sums) : nullptr;
        for (int64_t i = part.begin; i < part.end; i++) {
          const auto* pg = grads[i];
          const auto* pb = branch[i];
          auto* pdb = to[i];
          if (pdb) {
            for_each_vector(part, [&](int64_t k, const auto& get, const auto& put) {
              put(pdb + k, scale * of_channel(part, channels, i, k) * get(pg + k));
            });
          }
          if (!own) continue;
          add_line<1>(part, own, 0, i, [&](int64_t k, const auto& get, const auto&, auto& values) {
            values[0] = scale * get(pg + k) * get(pb + k);
          });
        }
      });
    });
    if (!error && dg.data) unpack_sums(lines, sums, dg);
    return error;
  });
}

}  // namespace

extern const ScaledResidualOps scaled_residual_ops;
const ScaledResidualOps scaled_residual_ops = {forward, backward};

}  // namespace VOPS_ISA
}  // namespace vops
