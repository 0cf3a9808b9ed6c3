// Device functions and qualifiers, which the host build of the tests replaces. Kernels access
// global memory by load and store only, so that the host build can check each access.
#pragma once
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DDF_DEVICE __device__ __forceinline__
#define DDF_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define DDF_UNROLL _Pragma("unroll")
#define DDF_STRING(text) #text
#define DDF_UNROLL_BY(count) _Pragma(DDF_STRING(unroll count))
#define DDF_UNROLL_NOT _Pragma("unroll 1")
// The dynamic shared memory of the block, 16-byte aligned, as an array of `type`.
#define DDF_SHARED(type, name)                                      \
  extern __shared__ __align__(16) unsigned char ddf_shared_bytes[]; \
  type* const name = reinterpret_cast<type*>(ddf_shared_bytes)

namespace ddf::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

DDF_DEVICE int thread_index() { return threadIdx.x; }
DDF_DEVICE int64_t block_index() { return blockIdx.x; }
DDF_DEVICE void sync_threads() { __syncthreads(); }
DDF_DEVICE void sync_warp() { __syncwarp(); }
// Keeps a branch on the kernel's arguments in the loop that calls this. Since sm_100 NVRTC, unlike
// nvcc, otherwise makes a copy of the loop for each side, and takes more registers. Neither copies
// a loop with inline assembly; this one has no instruction.
DDF_DEVICE void keep_branches() { asm volatile(""); }
// `value`, of which the compiler does not know that it is the same in each iteration of a loop:
// what depends on it takes no registers from one to the next. Keeps branches too.
DDF_DEVICE int in_each_iteration(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
// The value of lane (index ^ mask); all lanes of the warp must call it.
DDF_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

DDF_DEVICE float widen(float value) { return value; }
DDF_DEVICE double widen(double value) { return value; }
DDF_DEVICE float widen(Half value) { return __half2float(value); }
DDF_DEVICE float widen(BFloat16 value) { return __bfloat162float(value); }

template <typename T>
DDF_DEVICE auto load(const T* p) {
  return widen(__ldg(p));
}

// Rounded to nearest, ties to even. Before sm_80, without an instruction for it, CUDA's functions
// take 6 instructions more for each value, and have branches that nvcc and NVRTC compile to
// different code.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
// In the upper half.
DDF_DEVICE unsigned bfloat16_bits(float value) {
  const unsigned bits = __float_as_uint(value);
  return value != value ? 0x7fff0000u : bits + 0x7fffu + (bits >> 16 & 1u);
}
DDF_DEVICE BFloat16 to_bfloat16(float value) {
  return __ushort_as_bfloat16(static_cast<unsigned short>(bfloat16_bits(value) >> 16));
}
DDF_DEVICE unsigned to_bfloat16_pair(float low, float high) {
  return __byte_perm(bfloat16_bits(low), bfloat16_bits(high), 0x7632);
}
#else
DDF_DEVICE BFloat16 to_bfloat16(float value) { return __float2bfloat16_rn(value); }
DDF_DEVICE unsigned to_bfloat16_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const unsigned&>(pair);
}
#endif

DDF_DEVICE void store(float* p, float value) { *p = value; }
DDF_DEVICE void store(double* p, double value) { *p = value; }
DDF_DEVICE void store(Half* p, float value) { *p = __float2half_rn(value); }
DDF_DEVICE void store(BFloat16* p, float value) { *p = to_bfloat16(value); }

// Four consecutive elements; the address is aligned to their size.
DDF_DEVICE void load4(float* to, const float* p) {
  const float4 four = __ldg(reinterpret_cast<const float4*>(p));
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}

// Converts four elements of the type of the last argument.
DDF_DEVICE void to_floats(float* to, uint2 bits, Half) {
  const float2 low = __half22float2(reinterpret_cast<const __half2&>(bits.x));
  const float2 high = __half22float2(reinterpret_cast<const __half2&>(bits.y));
  to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
}

// A bfloat16 is the upper half of a float32.
DDF_DEVICE void to_floats(float* to, uint2 bits, BFloat16) {
  to[0] = __uint_as_float(bits.x << 16), to[1] = __uint_as_float(bits.x & 0xffff0000u);
  to[2] = __uint_as_float(bits.y << 16), to[3] = __uint_as_float(bits.y & 0xffff0000u);
}

template <typename T>
DDF_DEVICE void load4(float* to, const T* p) {
  to_floats(to, __ldg(reinterpret_cast<const uint2*>(p)), T{});
}

// The value, or four, if `inside`, otherwise zeros. Values are converted after the condition, which
// then is a predicate of the load: by a branch, each load would be waited for before the next.
DDF_DEVICE float load_if(const float* p, bool inside) { return inside ? __ldg(p) : 0.f; }
DDF_DEVICE float load_if(const Half* p, bool inside) {
  unsigned short bits = 0;
  if (inside) bits = __ldg(reinterpret_cast<const unsigned short*>(p));
  return __half2float(__ushort_as_half(bits));
}
DDF_DEVICE float load_if(const BFloat16* p, bool inside) {
  unsigned short bits = 0;
  if (inside) bits = __ldg(reinterpret_cast<const unsigned short*>(p));
  return __uint_as_float(static_cast<unsigned>(bits) << 16);
}

DDF_DEVICE void load4_if(float* to, const float* p, bool inside) {
  float4 four = make_float4(0.f, 0.f, 0.f, 0.f);
  if (inside) four = __ldg(reinterpret_cast<const float4*>(p));
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}
template <typename T>
DDF_DEVICE void load4_if(float* to, const T* p, bool inside) {
  uint2 bits = make_uint2(0, 0);
  if (inside) bits = __ldg(reinterpret_cast<const uint2*>(p));
  to_floats(to, bits, T{});
}

DDF_DEVICE void store4(float* p, const float* from) {
  *reinterpret_cast<float4*>(p) = make_float4(from[0], from[1], from[2], from[3]);
}

DDF_DEVICE void store4(Half* p, const float* from) {
  const __half2 low = __floats2half2_rn(from[0], from[1]);
  const __half2 high = __floats2half2_rn(from[2], from[3]);
  *reinterpret_cast<uint2*>(p) =
      make_uint2(reinterpret_cast<const unsigned&>(low), reinterpret_cast<const unsigned&>(high));
}

DDF_DEVICE void store4(BFloat16* p, const float* from) {
  *reinterpret_cast<uint2*>(p) =
      make_uint2(to_bfloat16_pair(from[0], from[1]), to_bfloat16_pair(from[2], from[3]));
}

// Two consecutive elements; the address is aligned to their size.
DDF_DEVICE void store2(float* p, const float* from) {
  *reinterpret_cast<float2*>(p) = make_float2(from[0], from[1]);
}

DDF_DEVICE void store2(Half* p, const float* from) {
  *reinterpret_cast<__half2*>(p) = __floats2half2_rn(from[0], from[1]);
}

DDF_DEVICE void store2(BFloat16* p, const float* from) {
  *reinterpret_cast<unsigned*>(p) = to_bfloat16_pair(from[0], from[1]);
}

// Four floats of shared memory, 16-byte aligned.
DDF_DEVICE void load_shared4(float* to, const float* p) {
  const float4 four = *reinterpret_cast<const float4*>(p);
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}

DDF_DEVICE void store_shared4(float* p, const float* from) {
  *reinterpret_cast<float4*>(p) = make_float4(from[0], from[1], from[2], from[3]);
}

// Copies `Count` consecutive elements, 4, 8 or 16 bytes to which both addresses are aligned, from
// global to shared memory, where this thread finds them after await_copies. GPUs before sm_80 wait
// for them here.
template <int Count, typename T>
DDF_DEVICE void copy_to_shared(float* to, const T* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from),
               "n"(Count * static_cast<int>(sizeof(T)))
               : "memory");
#else
  DDF_UNROLL
  for (int i = 0; i < Count * static_cast<int>(sizeof(T)) / 4; ++i) {
    to[i] = __ldg(reinterpret_cast<const float*>(from) + i);
  }
#endif
}

// Like copy_to_shared if `inside`, otherwise zeros.
template <int Count, typename T>
DDF_DEVICE void copy_to_shared_if(float* to, const T* from, bool inside) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  constexpr int kBytes = Count * static_cast<int>(sizeof(T));
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from),
               "n"(kBytes), "r"(inside ? kBytes : 0)
               : "memory");
#else
  DDF_UNROLL
  for (int i = 0; i < Count * static_cast<int>(sizeof(T)) / 4; ++i) {
    to[i] = load_if(reinterpret_cast<const float*>(from) + i, inside);
  }
#endif
}

// Ends a group of copies.
DDF_DEVICE void end_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all groups of copies of this thread but the last `Pending`.
template <int Pending>
DDF_DEVICE void await_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// Elements of type T in shared memory: one, and four, whose address is aligned to their size.
template <typename T>
DDF_DEVICE float load_copied(const float* p, int index) {
  return widen(reinterpret_cast<const T*>(p)[index]);
}

template <typename T>
DDF_DEVICE void load_copied4(float* to, const float* p) {
  if constexpr (sizeof(T) == 4) {
    load_shared4(to, p);
  } else {
    to_floats(to, *reinterpret_cast<const uint2*>(p), T{});
  }
}

}  // namespace ddf::cuda

#elif defined(DDF_KERNELS_BY_NAME)
#include "by_name.cuh"
#else
#include "cuda_on_host.h"
#endif

// NVRTC, which compiles no launches, only parses them.
#if defined(__CUDACC_RTC__)
#define DDF_HANDLE(...) (&__VA_ARGS__)
#else
#include "handle.cuh"
#endif
