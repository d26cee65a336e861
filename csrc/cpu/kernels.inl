// Every kernel for one SIMD level, and their table. The including file names what fits the level's registers: the codes
// of a tile of the search (kCodesPerTile), the items of a tile of the entropy sweeps (kEntropyTile), and how many
// channels these sum at a time (kEntropyChannels).
//
// All that is included here lies in unnamed namespaces: nothing that is compiled for one level may be linked into
// another.
#include "kernels.h"

#include "exponential.inl"
#include "entropy.inl"
#include "pixelcnn_head.inl"
#include "pixelcnn_layer.inl"
#include "pixelcnn_step.inl"
#include "sample.inl"
#include "search.inl"

namespace vqkernels {
namespace {

template <class T>
constexpr PixelCNNKernels<T> kPixelCNN = {
    pixelcnn::advance_row<T>,  pixelcnn::advance_column<T>,   pixelcnn::vertical<T>, pixelcnn::vertical_backward<T>,
    pixelcnn::gate_forward<T>, pixelcnn::gate_backward<T>,    pixelcnn::join<T>,     pixelcnn::join_backward<T>,
    pixelcnn::filters<T>,      pixelcnn::filters_backward<T>, pixelcnn::taps<T>,     pixelcnn::taps_backward<T>,
    pixelcnn::rectify<T>,      pixelcnn::rectify_backward<T>, pixelcnn::planes<T>,   pixelcnn::planes_backward<T>};

constexpr Kernels kKernels = {filter::kSweep,         entropy_sweeps::kEntropy, sampling::sample_panel,
                              pixelcnn::exponentials, kPixelCNN<float>,         kPixelCNN<double>};

}  // namespace
}  // namespace vqkernels
