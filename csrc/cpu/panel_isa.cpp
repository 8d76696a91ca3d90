#include "panel.h"

namespace vops {
namespace VOPS_ISA {
namespace {

// Rows that follow each other without a gap are one long row: fewer ragged ends.
struct Run {
  int64_t rows, columns;
};
Run merged_rows(const Tensor4& t, int64_t rows) {
  const bool gapless = t.stride[2] == t.size[3] * t.stride[3] || t.size[2] == 1;
  return gapless ? Run{1, rows * t.size[3]} : Run{rows, t.size[3]};
}

// The blocks of a pixel are some cache lines of each of its rows of channels, which is not a stream that processors
// foresee: asks for those of a pixel further on.
constexpr int64_t kPixelsAhead = 16;
template <int write, class T>
VOPS_INLINE void prefetch_pixel(const T* pixel, int64_t step, int64_t channels) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t c = 0; c < channels; c += kLine) __builtin_prefetch(pixel + kPixelsAhead * step + c, write);
}

template <class T>
void pack_channels_last(const T* base, const Tensor4& t, Run run, int64_t channels, float* panel,
                        int64_t block_stride) {
  const int64_t full = channels / kLanes * kLanes;
  for (int64_t r = 0; r < run.rows; r++) {
    const T* p = base + r * t.stride[2];
    for (int64_t i = 0; i < run.columns; i++, p += t.stride[3], panel += kLanes) {
      prefetch_pixel<0>(p, t.stride[3], channels);
      float* out = panel;
      for (int64_t c = 0; c < full; c += kLanes, out += block_stride) store(out, load(p + c));
      if (full < channels) store(out, load_n(p + full, (int)(channels - full)));
    }
  }
}
template <class T>
void unpack_channels_last(T* base, const Tensor4& t, Run run, int64_t channels, const float* panel,
                          int64_t block_stride) {
  const int64_t full = channels / kLanes * kLanes;
  for (int64_t r = 0; r < run.rows; r++) {
    T* p = base + r * t.stride[2];
    for (int64_t i = 0; i < run.columns; i++, p += t.stride[3], panel += kLanes) {
      prefetch_pixel<1>(p, t.stride[3], channels);
      const float* in = panel;
      for (int64_t c = 0; c < full; c += kLanes, in += block_stride) store(p + c, load(in));
      if (full < channels) store_n(p + full, load(in), (int)(channels - full));
    }
  }
}

// One block of channels whose columns are neighbours in memory: transposed on the way.
template <class T>
void pack_planes(const T* base, const Tensor4& t, Run run, int channels, float* panel) {
  for (int64_t r = 0; r < run.rows; r++) {
    for (int64_t i = 0; i < run.columns; i += kLanes) {
      const int columns = (int)min64(kLanes, run.columns - i);
      const T* p = base + r * t.stride[2] + i;
      Float v[kLanes];
      for (int k = 0; k < kLanes; k++, p += t.stride[1]) {
        v[k] = k >= channels ? Float{} : columns == kLanes ? load(p) : load_n(p, columns);
      }
      transpose(v);
      for (int k = 0; k < columns; k++, panel += kLanes) store(panel, v[k]);
    }
  }
}
template <class T>
void unpack_planes(T* base, const Tensor4& t, Run run, int channels, const float* panel) {
  for (int64_t r = 0; r < run.rows; r++) {
    for (int64_t i = 0; i < run.columns; i += kLanes) {
      const int columns = (int)min64(kLanes, run.columns - i);
      Float v[kLanes];
      for (int k = 0; k < kLanes; k++) v[k] = k < columns ? load(panel + k * kLanes) : Float{};
      panel += columns * kLanes;
      transpose(v);
      T* p = base + r * t.stride[2] + i;
      for (int k = 0; k < channels; k++, p += t.stride[1]) {
        if (columns == kLanes) {
          store(p, v[k]);
        } else {
          store_n(p, v[k], columns);
        }
      }
    }
  }
}

// Any strides, element by element; float64 is there for exactness, not for speed, and always comes here.
template <class T, class A>
void pack_scattered(const T* base, const Tensor4& t, int64_t rows, int channels, A* panel) {
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t i = 0; i < t.size[3]; i++, panel += kLanes) {
      T v[kLanes] = {};
      for (int k = 0; k < channels; k++) v[k] = base[k * t.stride[1] + r * t.stride[2] + i * t.stride[3]];
      store(panel, load(v));
    }
  }
}
template <class T, class A>
void unpack_scattered(T* base, const Tensor4& t, int64_t rows, int channels, const A* panel) {
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t i = 0; i < t.size[3]; i++, panel += kLanes) {
      T v[kLanes];
      store(v, load(panel));
      for (int k = 0; k < channels; k++) base[k * t.stride[1] + r * t.stride[2] + i * t.stride[3]] = v[k];
    }
  }
}

template <class T>
T* first_element(const Tensor4& t, int64_t n, int64_t c, int64_t row) {
  return (T*)t.data + n * t.stride[0] + c * t.stride[1] + row * t.stride[2];
}
int channels_of_block(Channels c, int64_t block) { return (int)min64(kLanes, c.count - block * kLanes); }

template <class T>
void pack(const Tensor4& t, int64_t n, Channels c, int64_t begin, int64_t end, float* panel, int64_t block_stride) {
  const Run run = merged_rows(t, end - begin);
  if (is_channels_last(t)) {
    return pack_channels_last(first_element<T>(t, n, c.begin, begin), t, run, c.count, panel, block_stride);
  }
  for (int64_t b = 0; b < c.blocks(); b++) {
    const T* base = first_element<T>(t, n, c.begin + b * kLanes, begin);
    const int channels = channels_of_block(c, b);
    if (t.stride[3] == 1) {
      pack_planes(base, t, run, channels, panel + b * block_stride);
    } else {
      pack_scattered(base, t, end - begin, channels, panel + b * block_stride);
    }
  }
}
template <class T>
void unpack(const float* panel, int64_t block_stride, const Tensor4& t, int64_t n, Channels c, int64_t begin,
            int64_t end) {
  const Run run = merged_rows(t, end - begin);
  if (is_channels_last(t)) {
    return unpack_channels_last(first_element<T>(t, n, c.begin, begin), t, run, c.count, panel, block_stride);
  }
  for (int64_t b = 0; b < c.blocks(); b++) {
    T* base = first_element<T>(t, n, c.begin + b * kLanes, begin);
    const int channels = channels_of_block(c, b);
    if (t.stride[3] == 1) {
      unpack_planes(base, t, run, channels, panel + b * block_stride);
    } else {
      unpack_scattered(base, t, end - begin, channels, panel + b * block_stride);
    }
  }
}

template <class A, class F>
VOPS_INLINE void map(A* u, int64_t vectors, F f) {
  for (int64_t i = 0; i < vectors; i++, u += kLanes) store(u, f(load(u)));
}
template <class A, class F>
VOPS_INLINE void map_backward(A* u, const A* dy, int64_t vectors, F f) {
  for (int64_t i = 0; i < vectors; i++, u += kLanes, dy += kLanes) store(u, load(dy) * f(load(u)));
}

template <class T, class F>
VOPS_INLINE void map_tensor(const Tensor4& u, int64_t n, Channels c, int64_t begin, int64_t end, F f) {
  for (int64_t r = begin; r < end; r++) {
    T* p = first_element<T>(u, n, c.begin, r);
    for (int64_t i = 0; i < u.size[3]; i++, p += u.stride[3]) {
      for (int64_t k = 0; k < c.count; k += kLanes) store(p + k, f(load(p + k)));
    }
  }
}
template <class T, class F>
VOPS_INLINE void map_tensor_backward(const Tensor4& u, const Tensor4& dy, int64_t n, Channels c, int64_t begin,
                                     int64_t end, F f) {
  for (int64_t r = begin; r < end; r++) {
    T* p = first_element<T>(u, n, c.begin, r);
    const T* g = first_element<T>(dy, n, c.begin, r);
    for (int64_t i = 0; i < u.size[3]; i++, p += u.stride[3], g += dy.stride[3]) {
      for (int64_t k = 0; k < c.count; k += kLanes) store(p + k, load(g + k) * f(load(p + k)));
    }
  }
}
template <class T>
void activate_tensor_of(const Tensor4& u, int64_t n, Channels c, int64_t begin, int64_t end, Activation act) {
  if (act == kGelu) map_tensor<T>(u, n, c, begin, end, [](Float v) { return gelu(v); });
  if (act == kSilu) map_tensor<T>(u, n, c, begin, end, [](Float v) { return silu(v); });
}
template <class T>
void activate_tensor_backward_of(const Tensor4& u, const Tensor4& dy, int64_t n, Channels c, int64_t begin, int64_t end,
                                 Activation act) {
  if (act == kGelu) map_tensor_backward<T>(u, dy, n, c, begin, end, [](Float v) { return gelu_grad(v); });
  if (act == kSilu) map_tensor_backward<T>(u, dy, n, c, begin, end, [](Float v) { return silu_grad(v); });
}

}  // namespace

bool is_channels_last(const Tensor4& t) { return t.stride[1] == 1 || t.size[1] == 1; }

template <>
void pack_rows(const Tensor4& t, int64_t n, Channels c, int64_t begin, int64_t end, float* panel,
               int64_t block_stride) {
  if (t.dtype == kFloat32) return pack<float>(t, n, c, begin, end, panel, block_stride);
  if (t.dtype == kBFloat16) return pack<bf16>(t, n, c, begin, end, panel, block_stride);
  pack<f16>(t, n, c, begin, end, panel, block_stride);
}
template <>
void unpack_rows(const float* panel, int64_t block_stride, const Tensor4& t, int64_t n, Channels c, int64_t begin,
                 int64_t end) {
  if (t.dtype == kFloat32) return unpack<float>(panel, block_stride, t, n, c, begin, end);
  if (t.dtype == kBFloat16) return unpack<bf16>(panel, block_stride, t, n, c, begin, end);
  unpack<f16>(panel, block_stride, t, n, c, begin, end);
}
template <>
void pack_rows(const Tensor4& t, int64_t n, Channels c, int64_t begin, int64_t end, double* panel,
               int64_t block_stride) {
  for (int64_t b = 0; b < c.blocks(); b++) {
    const double* base = first_element<double>(t, n, c.begin + b * kLanes, begin);
    pack_scattered(base, t, end - begin, channels_of_block(c, b), panel + b * block_stride);
  }
}
template <>
void unpack_rows(const double* panel, int64_t block_stride, const Tensor4& t, int64_t n, Channels c, int64_t begin,
                 int64_t end) {
  for (int64_t b = 0; b < c.blocks(); b++) {
    double* base = first_element<double>(t, n, c.begin + b * kLanes, begin);
    unpack_scattered(base, t, end - begin, channels_of_block(c, b), panel + b * block_stride);
  }
}

template <>
void activate(float* u, int64_t vectors, Activation act) {
  if (act == kGelu) map(u, vectors, [](Float v) { return gelu(v); });
  if (act == kSilu) map(u, vectors, [](Float v) { return silu(v); });
}
template <>
void activate_backward(float* u, const float* dy, int64_t vectors, Activation act) {
  if (act == kGelu) map_backward(u, dy, vectors, [](Float v) { return gelu_grad(v); });
  if (act == kSilu) map_backward(u, dy, vectors, [](Float v) { return silu_grad(v); });
}
void activate_tensor(const Tensor4& u, int64_t n, Channels c, int64_t begin, int64_t end, Activation act) {
  if (u.dtype == kFloat32) return activate_tensor_of<float>(u, n, c, begin, end, act);
  if (u.dtype == kBFloat16) return activate_tensor_of<bf16>(u, n, c, begin, end, act);
  activate_tensor_of<f16>(u, n, c, begin, end, act);
}
void activate_tensor_backward(const Tensor4& u, const Tensor4& dy, int64_t n, Channels c, int64_t begin, int64_t end,
                              Activation act) {
  if (u.dtype == kFloat32) return activate_tensor_backward_of<float>(u, dy, n, c, begin, end, act);
  if (u.dtype == kBFloat16) return activate_tensor_backward_of<bf16>(u, dy, n, c, begin, end, act);
  activate_tensor_backward_of<f16>(u, dy, n, c, begin, end, act);
}
template <>
void activate(double* u, int64_t vectors, Activation act) {
  if (act == kGelu) map(u, vectors, [](Double v) { return gelu(v); });
  if (act == kSilu) map(u, vectors, [](Double v) { return silu(v); });
}
template <>
void activate_backward(double* u, const double* dy, int64_t vectors, Activation act) {
  if (act == kGelu) map_backward(u, dy, vectors, [](Double v) { return gelu_grad(v); });
  if (act == kSilu) map_backward(u, dy, vectors, [](Double v) { return silu_grad(v); });
}

}  // namespace VOPS_ISA
}  // namespace vops
