// The activations of all kernels.
#pragma once

namespace vops {

// The depthwise engines have no Hardswish.
enum Activation : int { kNoActivation = 0, kGelu = 1, kSilu = 2, kHardswish = 3 };

}  // namespace vops
