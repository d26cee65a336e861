// The passes of a PixelCNN's head for one SIMD level: see pixelcnn_head.h.
#include "pixelcnn_head.h"

#include <algorithm>

#include "gate.inl"

namespace vqkernels {
namespace {
namespace pixelcnn {

template <class T> inline void rectify(const PixelCNNHead<T>& x, int64_t first, int64_t last) {
  using Vector = typename Lanes<T>::Vector;
  const Vector zero = splat(T(0));
  for (int64_t row = first * x.size; row < last * x.size; ++row)
    for (int64_t c = 0; c < x.channels; c += Lanes<T>::kCount) {
      const int64_t at = row * x.channels + c, left = x.channels - c;
      const Vector y = add(load_some(x.from + at, left), load_some(x.bias + c, left));
      store_some(x.to + at, y < zero ? zero : y, left);  // a NaN stays one
    }
}

template <class T> inline void rectify_backward(const PixelCNNHead<T>& x, int64_t first, int64_t last) {
  using Vector = typename Lanes<T>::Vector;
  const Vector zero = splat(T(0));
  for (int64_t grid = first; grid < last; ++grid) {
    T* sums = x.sums + grid * x.channels;
    memset(sums, 0, x.channels * sizeof(T));
    for (int64_t row = grid * x.size; row < (grid + 1) * x.size; ++row)
      for (int64_t c = 0; c < x.channels; c += Lanes<T>::kCount) {
        const int64_t at = row * x.channels + c, left = x.channels - c;
        const Vector y = load_some(x.hidden + at, left) <= zero ? zero : load_some(x.from + at, left);
        store_some(x.to + at, y, left);
        store_some(sums + c, add(load_some(sums + c, left), y), left);
      }
  }
}

// to[column][row] = from[row][column] + bias[column or row]; a square block at a time, which the first-level cache
// holds. A float32 block is turned in registers.
constexpr int64_t kBlockSide = 16;

template <class T>
inline void turn(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows, int64_t columns) {
  if constexpr (sizeof(T) == 4 && kBlockSide % kLanes == 0) {
    if (rows == kBlockSide && columns == kBlockSide) {
      for (int64_t r = 0; r < kBlockSide; r += kLanes)
        for (int64_t c = 0; c < kBlockSide; c += kLanes) {
          Ints x[kLanes];
          for (int i = 0; i < kLanes; ++i)
            x[i] = load(reinterpret_cast<const int32_t*>(from + (r + i) * from_stride + c));
          transpose(x);
          for (int i = 0; i < kLanes; ++i) store(reinterpret_cast<int32_t*>(to + (c + i) * to_stride + r), x[i]);
        }
      return;
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
}

template <class T> inline void planes(const PixelCNNHead<T>& x, int64_t first, int64_t last) {
  T block[kBlockSide * kBlockSide];
  for (int64_t grid = first; grid < last; ++grid) {
    const T* rows = x.from + grid * x.size * x.channels;
    T* planes = x.to + grid * x.size * x.channels;
    for (int64_t c = 0; c < x.channels; c += kBlockSide)
      for (int64_t p = 0; p < x.size; p += kBlockSide) {
        const int64_t channels = std::min(kBlockSide, x.channels - c), positions = std::min(kBlockSide, x.size - p);
        turn(rows + p * x.channels + c, x.channels, block, kBlockSide, positions, channels);
        for (int64_t i = 0; i < channels; ++i)
          for (int64_t j = 0; j < positions; ++j)
            planes[(c + i) * x.size + p + j] = block[i * kBlockSide + j] + x.bias[c + i];
      }
  }
}

template <class T> inline void planes_backward(const PixelCNNHead<T>& x, int64_t first, int64_t last) {
  T block[kBlockSide * kBlockSide];
  for (int64_t grid = first; grid < last; ++grid) {
    const T* planes = x.from + grid * x.size * x.channels;
    T *rows = x.to + grid * x.size * x.channels, *sums = x.sums + grid * x.channels;
    memset(sums, 0, x.channels * sizeof(T));
    for (int64_t c = 0; c < x.channels; c += kBlockSide)
      for (int64_t p = 0; p < x.size; p += kBlockSide) {
        const int64_t channels = std::min(kBlockSide, x.channels - c), positions = std::min(kBlockSide, x.size - p);
        turn(planes + c * x.size + p, x.size, block, kBlockSide, channels, positions);
        for (int64_t j = 0; j < positions; ++j)
          for (int64_t i = 0; i < channels; ++i) {
            const T value = block[j * kBlockSide + i];
            rows[(p + j) * x.channels + c + i] = value;
            sums[c + i] += value;
          }
      }
  }
}

}  // namespace pixelcnn
}  // namespace
}  // namespace vqkernels
