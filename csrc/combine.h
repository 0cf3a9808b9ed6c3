// The kernel-combine modes, shared by CPU and CUDA kernels: how tap c of the channel filter and tap
// s of the spatial filter make one weight, and the derivatives. README.md says how to add a mode.
// No framework includes. V is a float, a double or a vector of them.
#pragma once

#if defined(__CUDACC__)
#define DDF_COMBINE __host__ __device__ __forceinline__
#else
#define DDF_COMBINE inline __attribute__((always_inline))
#endif

namespace ddf {

// output = sum of x * weight(c, s). With p = grad * x, grad_channel and grad_spatial are the terms
// of the gradients of c and s.
struct Mul {
  // Stands for a filter that is None: the weight is the other filter. Finite, and so is the weight
  // of two of them, which kernels multiply by zero padding.
  static constexpr float kNeutral = 1;
  // Whether grad_channel and grad_spatial depend on c and s; if not, kernels do not load them.
  static constexpr bool kGradReadsFilters = true;

  template <class V>
  static DDF_COMBINE V weight(V c, V s) {
    return c * s;
  }
  template <class V>
  static DDF_COMBINE V grad_channel(V p, V, V s) {
    return p * s;
  }
  template <class V>
  static DDF_COMBINE V grad_spatial(V p, V c, V) {
    return p * c;
  }
};

struct Add {
  static constexpr float kNeutral = 0;
  static constexpr bool kGradReadsFilters = false;

  template <class V>
  static DDF_COMBINE V weight(V c, V s) {
    return c + s;
  }
  template <class V>
  static DDF_COMBINE V grad_channel(V p, V, V) {
    return p;
  }
  template <class V>
  static DDF_COMBINE V grad_spatial(V p, V, V) {
    return p;
  }
};

enum class CombineMode : int { mul, add };
// Values of the argument kernel_combine, in the order of CombineMode.
constexpr const char* kCombineNames[] = {"mul", "add"};

// Calls function(Mul()) or function(Add()).
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class F>
DDF_COMBINE auto with_combine(CombineMode mode, const F& function) {
  if (mode == CombineMode::mul) return function(Mul());
  return function(Add());
}

}  // namespace ddf
