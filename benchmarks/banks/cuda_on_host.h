// Runs the kernels for the addresses that their threads access in shared memory, and counts bank
// conflicts; cuda_dispatch.cpp includes it in place of the device part of csrc/cuda/platform.cuh.
//
// No address depends on a value of a tensor. So loads from global memory return zeros, stores do
// nothing, and a thread runs to its end before the next begins. What the lanes of a warp access
// together are the accesses of one instruction, equally often repeated since the last barrier.
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <vector>

#define DDF_DEVICE inline
#define DDF_KERNEL(...) void
#define DDF_UNROLL
#define DDF_UNROLL_BY(count)
#define DDF_UNROLL_NOT
#define DDF_SHARED(type, name) \
  auto* const name = reinterpret_cast<::ddf::banks::Recorded<type>*>(::ddf::banks::shared_memory())
#define DDF_ALWAYS_INLINE inline __attribute__((always_inline))

namespace ddf::banks {

constexpr int kWarp = 32, kBanks = 32, kWordBytes = 4;

// Of the accesses of one instruction.
struct Pattern {
  int64_t requests = 0;    // of warps
  int64_t wavefronts = 0;  // cycles of shared memory
  int64_t least = 0;       // the same without conflicts
  double worst = 0;        // wavefronts by the least, of one request
};

class Recorder {
 public:
  std::map<const void*, Pattern> patterns;  // by return address

  void run(const std::function<void()>& kernel, int64_t block, int threads, size_t shared_bytes) {
    block_ = block;
    memory_.assign(shared_bytes / sizeof(Unit) + 1, Unit{});
    bytes_ = shared_bytes;
    for (thread_ = 0; thread_ < threads;) {
      sync_ = 0;
      counts_.clear();
      kernel();
      if (++thread_ % kWarp == 0 || thread_ == threads) finish_warp();
    }
  }

  int thread() const { return thread_; }
  int64_t block() const { return block_; }
  void* memory() { return memory_.data(); }
  void sync() {
    ++sync_;
    counts_.clear();
  }

  void add(const void* place, const void* address, int bytes) {
    const auto offset =
        static_cast<const char*>(address) - reinterpret_cast<const char*>(memory_.data());
    if (offset < 0 || offset + bytes > static_cast<int64_t>(bytes_)) {
      throw std::runtime_error("access outside of the shared memory");
    }
    requests_[{place, sync_, counts_[place]++}].push_back({thread_ % kWarp, offset, bytes});
  }

 private:
  struct Access {
    int lane;
    int64_t offset;
    int bytes;
  };
  struct alignas(16) Unit {
    char bytes[16];
  };

  // Accesses of 16 bytes are made by 8 lanes at once, of 8 bytes by 16; lanes that access the same
  // word share it. Words of a bank that differ take a wavefront each.
  void finish_warp() {
    for (const auto& [key, accesses] : requests_) {
      const int lanes_at_once = kWarp * kWordBytes / std::max(accesses[0].bytes, kWordBytes);
      std::map<int, std::set<int64_t>> parts;
      for (const Access& access : accesses) {
        for (int64_t byte = 0; byte < access.bytes; byte += kWordBytes) {
          parts[access.lane / lanes_at_once].insert((access.offset + byte) / kWordBytes);
        }
      }
      std::set<std::set<int64_t>> different;
      for (const auto& part : parts) different.insert(part.second);
      int64_t wavefronts = 0;
      for (const auto& words : different) {
        std::vector<int64_t> in_bank(kBanks);
        for (const int64_t word : words) ++in_bank[word % kBanks];
        wavefronts += *std::max_element(in_bank.begin(), in_bank.end());
      }
      const int64_t least = different.size();
      Pattern& pattern = patterns[std::get<0>(key)];
      ++pattern.requests;
      pattern.wavefronts += wavefronts;
      pattern.least += least;
      pattern.worst = std::max(pattern.worst, static_cast<double>(wavefronts) / least);
    }
    requests_.clear();
  }

  // Of a warp, by place, barriers before it, and accesses at the place since the last barrier.
  std::map<std::tuple<const void*, int, int>, std::vector<Access>> requests_;
  std::map<const void*, int> counts_;
  std::vector<Unit> memory_;
  size_t bytes_ = 0;
  int64_t block_ = 0;
  int thread_ = 0, sync_ = 0;
};

inline Recorder recorder;
inline void* shared_memory() { return recorder.memory(); }

// The instruction is known by the address to which this returns: all callers are inlined.
__attribute__((noinline)) inline void record(const void* address, int bytes) {
  recorder.add(__builtin_return_address(0), address, bytes);
}

// A number in shared memory.
template <typename T>
class Recorded {
 public:
  Recorded(const Recorded&) = delete;

  DDF_ALWAYS_INLINE operator T() const {
    record(this, sizeof(T));
    return value_;
  }
  DDF_ALWAYS_INLINE Recorded& operator=(T value) {
    record(this, sizeof(T));
    value_ = value;
    return *this;
  }
  DDF_ALWAYS_INLINE Recorded& operator+=(T value) { return *this = *this + value; }

 private:
  T value_;
};

}  // namespace ddf::banks

namespace ddf::cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline int thread_index() { return banks::recorder.thread(); }
inline int64_t block_index() { return banks::recorder.block(); }
inline void sync_threads() { banks::recorder.sync(); }
inline void sync_warp() { banks::recorder.sync(); }
inline void keep_branches() {}
inline int in_each_iteration(int value) { return value; }
inline float shuffle_xor(float value, int) { return value; }

template <typename T>
using Loaded = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
Loaded<T> load(const T*) {
  return 0;
}
template <typename T>
void store(T*, Loaded<T>) {}
template <typename T>
void load4(float* to, const T*) {
  std::fill(to, to + 4, 0.f);
}
template <typename T>
float load_if(const T*, bool) {
  return 0;
}
template <typename T>
void load4_if(float* to, const T*, bool) {
  std::fill(to, to + 4, 0.f);
}
template <typename T>
void store4(T*, const float*) {}
template <typename T>
void store2(T*, const float*) {}

DDF_ALWAYS_INLINE void load_shared4(float* to, const banks::Recorded<float>* p) {
  banks::record(p, 4 * sizeof(float));
  std::fill(to, to + 4, 0.f);
}
DDF_ALWAYS_INLINE void store_shared4(banks::Recorded<float>* p, const float*) {
  banks::record(p, 4 * sizeof(float));
}
template <int Count, typename T>
DDF_ALWAYS_INLINE void copy_to_shared(banks::Recorded<float>* to, const T*) {
  banks::record(to, Count * sizeof(T));
}
template <int Count, typename T>
DDF_ALWAYS_INLINE void copy_to_shared_if(banks::Recorded<float>* to, const T*, bool) {
  banks::record(to, Count * sizeof(T));
}
inline void end_copies() {}
template <int Pending>
void await_copies() {}
template <typename T>
DDF_ALWAYS_INLINE float load_copied(const banks::Recorded<float>* p, int) {
  banks::record(p, 4);
  return 0;
}
template <typename T>
DDF_ALWAYS_INLINE void load_copied4(float* to, const banks::Recorded<float>* p) {
  banks::record(p, 4 * sizeof(T));
  std::fill(to, to + 4, 0.f);
}

}  // namespace ddf::cuda
