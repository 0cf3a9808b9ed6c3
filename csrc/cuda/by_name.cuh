// In place of the device half of platform.cuh where the host's part is compiled by a C++ compiler
// alone: kernels are known by name and parameters, and NVRTC compiles them when they are needed
// (README.md).
#pragma once
#include <cstdint>
#include <type_traits>

#define DDF_DEVICE inline
// Their bodies are instantiated, since there are pointers to the kernels, but not compiled.
#define DDF_KERNEL(...) extern inline __attribute__((gnu_inline)) void
#define DDF_UNROLL
#define DDF_UNROLL_BY(count)
#define DDF_UNROLL_NOT
#define DDF_SHARED(type, name) type* const name = nullptr

namespace ddf::cuda {

// Types by which kernels are named; they have the size and alignment of those of the device.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Only declared: bodies of kernels call them.
template <typename T>
using Loaded = std::conditional_t<std::is_same_v<T, double>, double, float>;

int thread_index();
int64_t block_index();
void sync_threads();
void sync_warp();
void keep_branches();
int in_each_iteration(int value);
float shuffle_xor(float value, int mask);
template <typename T>
Loaded<T> load(const T* p);
template <typename T>
void store(T* p, Loaded<T> value);
template <typename T>
void load4(float* to, const T* p);
template <typename T>
float load_if(const T* p, bool inside);
template <typename T>
void load4_if(float* to, const T* p, bool inside);
template <typename T>
void store4(T* p, const float* from);
template <typename T>
void store2(T* p, const float* from);
void load_shared4(float* to, const float* p);
void store_shared4(float* p, const float* from);
template <int Count, typename T>
void copy_to_shared(float* to, const T* from);
template <int Count, typename T>
void copy_to_shared_if(float* to, const T* from, bool inside);
void end_copies();
template <int Pending>
void await_copies();
template <typename T>
float load_copied(const float* p, int index);
template <typename T>
void load_copied4(float* to, const float* p);

}  // namespace ddf::cuda
