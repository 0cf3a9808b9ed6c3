// All kernels: what NVRTC compiles one instantiation of.
#pragma once
#include "backward_3x3.cuh"
#include "backward_3x3_channels_last.cuh"
#include "filter_norm.cuh"
#include "forward_3x3.cuh"
#include "forward_3x3_channels_last.cuh"
#include "forward_tiled.cuh"
#include "gather_3x3.cuh"
#include "generic.cuh"
#include "grad_filters.cuh"
#include "grad_filters_channels_last.cuh"
#include "grad_filters_gathered.cuh"
#include "upsample.cuh"
