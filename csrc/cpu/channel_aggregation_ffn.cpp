// The whole op, some images or rows of one at a time: in between, Python would take longer to name the next ones than
// the threads take to wake.
#include "channel_aggregation_ffn.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "instruction_sets.h"
#include "pointwise.h"
#include "runtime.h"

namespace vops {

VOPS_CPU_OP(ChannelAggregationFfnOps, channel_aggregation_ffn)
VOPS_CPU_OP(PointwiseOps, pointwise)

namespace {

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

Tensor4 part(Tensor4 t, Range images, Range rows) {
  t.data = (float*)t.data + images.begin * t.stride[0] + rows.begin * t.stride[2];
  t.size[0] = images.size();
  t.size[2] = rows.size();
  return t;
}
Tensor4 channels(Tensor4 t, Range c) {
  t.data = (float*)t.data + c.begin * t.stride[1];
  t.size[1] = c.size();
  return t;
}
Tensor4 columns(Tensor4 matrix, Range c) {
  matrix.data = (float*)matrix.data + c.begin * matrix.stride[3];
  matrix.size[3] = c.size();
  return matrix;
}
Tensor4 transposed(Tensor4 matrix) {
  std::swap(matrix.size[2], matrix.size[3]);
  std::swap(matrix.stride[2], matrix.stride[3]);
  return matrix;
}

struct Chunk {
  Range images, rows;
  int64_t height;
  Tensor4 of(const Tensor4& t) const { return part(t, images, rows); }
  // As much of a buffer.
  Tensor4 first(const Tensor4& t) const { return part(t, {0, images.size()}, {0, rows.size()}); }
  // With the rows that a convolution reads around it.
  Chunk around(int64_t reach) const {
    return {images, {std::max<int64_t>(rows.begin - reach, 0), std::min(rows.end + reach, height)}, height};
  }
};

template <class F>
Error for_each_chunk(const Tensor4& x, ChannelAggregationFfnChunks size, const F& f) {
  const int64_t batch = x.size[0], height = x.size[2];
  for (int64_t n = 0; n < batch; n += size.images) {
    for (int64_t row = 0; row < height; row += size.rows) {
      const Chunk chunk = {{n, std::min(n + size.images, batch)}, {row, std::min(row + size.rows, height)}, height};
      if (const Error error = f(chunk)) return error;
    }
  }
  return nullptr;
}

Error multiply(const Tensor4& x, const Tensor4& w, const Tensor4& b, const Tensor4& y) {
  return cpu_pointwise().forward(x, w, b, {}, y);
}

int64_t kernel_of(const ChannelAggregationFfn& a) {
  int64_t kernel = 1;
  while (kernel * kernel < a.dw.size[3]) kernel += 2;
  return kernel;
}
// Of rows whose input begins so many rows above them.
DwConv convolution(int64_t kernel, int64_t above) { return {kernel, 1, 1, kernel / 2 - above, kernel / 2}; }

bool is_whole(const Tensor4& t, const Tensor4& x) { return t.size[0] == x.size[0] && t.size[2] == x.size[2]; }

typedef ChannelAggregationFfnTotals Totals;
constexpr Tensor4 Totals::* kTotals[] = {&Totals::fc1,           &Totals::fc1_bias, &Totals::dw,
                                         &Totals::dw_bias,       &Totals::fc2,      &Totals::decompose,
                                         &Totals::decompose_bias};
int64_t elements(const Tensor4& t) { return t.data ? t.size[0] * t.size[1] * t.size[2] * t.size[3] : 0; }
int64_t elements(const Totals& totals) {
  int64_t count = 0;
  for (const auto total : kTotals) count += elements(totals.*total);
  return count;
}
// The same in other memory.
Totals moved(Totals totals, float* to) {
  for (const auto total : kTotals) {
    const int64_t count = elements(totals.*total);
    if (count) (totals.*total).data = to;
    to += count;
  }
  return totals;
}

}  // namespace

Error channel_aggregation_ffn(const ChannelAggregationFfn& a, ChannelAggregationFfnChunks chunks, const Tensor4& f,
                              const Tensor4& h, const Tensor4& scores, const Tensor4& y) {
  const int64_t hidden = a.fc1.size[2], kernel = kernel_of(a), reach = kernel / 2;
  const bool keeps = is_whole(f, a.x);
  return for_each_chunk(a.x, chunks, [&](const Chunk& chunk) -> Error {
    const Chunk near = chunk.around(reach);
    Chunk missing = near;
    if (keeps && chunk.rows.begin) missing.rows.begin = std::min(chunk.rows.begin + reach, chunk.height);
    if (missing.rows.size()) {
      const Tensor4 to = keeps ? missing.of(f) : missing.first(f);
      if (const Error error = multiply(missing.of(a.x), a.fc1, a.fc1_bias, to)) return error;
    }
    const Tensor4 rows = chunk.first(h);
    const DwConv conv = convolution(kernel, chunk.rows.begin - near.rows.begin);
    if (const Error error = cpu_channel_aggregation_ffn().forward(
            keeps ? near.of(f) : near.first(f), a.dw, a.dw_bias, a.decompose, a.decompose_bias,
            channels(rows, {0, hidden}), channels(rows, {hidden, hidden + 1}), chunk.of(scores), conv)) {
      return error;
    }
    return multiply(channels(rows, {0, hidden + 1}), a.fc2, a.fc2_bias, chunk.of(y));
  });
}

Error channel_aggregation_ffn_backward(const ChannelAggregationFfn& a, ChannelAggregationFfnChunks chunks,
                                       const Tensor4& dy, const Tensor4& scores, const Tensor4& f, bool kept,
                                       const ChannelAggregationFfnBuffers& buffers, const Tensor4& dx,
                                       const Totals& totals) {
  const int64_t hidden = a.fc1.size[2], kernel = kernel_of(a), reach = kernel / 2, count = elements(totals);
  const int64_t width = a.x.size[3], dd_rows = std::min(chunks.rows + 2 * reach, a.x.size[2]);
  const int64_t dd_size = std::min(chunks.images, a.x.size[0]) * dd_rows * width;
  const std::unique_ptr<float[]> memory(new (std::nothrow) float[dd_size + count]);
  if (!memory) return kOutOfMemory;
  const Totals apart = moved(totals, memory.get() + dd_size);  // those of later chunks, before they are added
  bool is_first = true;
  const Error error = for_each_chunk(a.x, chunks, [&](const Chunk& chunk) -> Error {
    const Chunk near = chunk.around(reach), far = chunk.around(2 * reach);
    const Totals& parts = is_first ? totals : apart;
    const Tensor4 f_rows = kept ? far.of(f) : far.first(f), near_dy = near.of(dy);
    const Tensor4 h = chunk.first(buffers.h), dh = near.first(buffers.dh), df = chunk.first(buffers.df);
    const int64_t pixels = near.rows.size() * width;
    const Tensor4 dd = {
        memory.get(), kFloat32, {near.images.size(), 1, near.rows.size(), width}, {pixels, pixels, width, 1}};
    const ChannelAggregationFfnGrads grads = {
        df, parts.dw, parts.dw_bias, parts.decompose, parts.decompose_bias, parts.fc1_bias};
    const DwConv conv = convolution(kernel, near.rows.begin - far.rows.begin);
    Error error = kept ? nullptr : multiply(far.of(a.x), a.fc1, a.fc1_bias, f_rows);
    if (!error) error = multiply(near_dy, transposed(columns(a.fc2, {0, hidden})), {}, dh);
    if (!error) error = multiply(near_dy, transposed(columns(a.fc2, {hidden, hidden + 1})), {}, dd);
    if (!error) {
      error = cpu_channel_aggregation_ffn().backward(f_rows, a.dw, a.dw_bias, a.decompose, near.of(scores), dd, dh,
                                                     channels(h, {0, hidden}), channels(h, {hidden, hidden + 1}), grads,
                                                     chunk.rows.begin - near.rows.begin, conv);
    }
    if (!error && parts.fc2.data) {
      error = cpu_pointwise().backward_weight(chunk.of(dy), channels(h, {0, hidden + 1}), parts.fc2, {});
    }
    if (!error && parts.fc1.data) error = cpu_pointwise().backward_weight(df, chunk.of(a.x), parts.fc1, {});
    if (!error && dx.data) error = multiply(df, transposed(a.fc1), {}, chunk.of(dx));
    if (error || is_first) {
      is_first = false;
      return error;
    }
    for (const auto total : kTotals) {
      float* to = (float*)(totals.*total).data;
      const float* from = (const float*)(apart.*total).data;
      for (int64_t i = 0; i < elements(totals.*total); i++) to[i] += from[i];
    }
    return nullptr;
  });
  if (!is_first) return error;
  for (const auto total : kTotals) {  // of no pixels
    if ((totals.*total).data) memset((totals.*total).data, 0, elements(totals.*total) * sizeof(float));
  }
  return error;
}

}  // namespace vops
