#include "march_conv.cuh"
#include "march_wgrad.cuh"

template vops::Error vops::march<7>(const March&, cudaStream_t);
template vops::Error vops::march_wgrad<7>(const MarchWgrad&, cudaStream_t);
template int64_t vops::march_wgrad_splits<7>(const MarchWgrad&);
