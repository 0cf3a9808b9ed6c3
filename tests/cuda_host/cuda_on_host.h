// Runs the sources of the CUDA kernels on the host: the threads of a block are fibers that switch
// at barriers and shuffles. It replaces the device part of csrc/cuda/platform.cuh.
//
// It detects reads and writes outside of the tensors, misaligned vector access, elements written
// twice or never, divergent barriers and shuffles, and launches that CUDA would reject. Shared
// memory and results are initialized with NaN. A missing barrier shows as a difference between
// orders of the threads. It cannot detect races that need threads to be interrupted between
// barriers.
#pragma once
#include <setjmp.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define DDF_DEVICE inline
#define DDF_KERNEL(...) void
#define DDF_UNROLL
#define DDF_UNROLL_BY(count)
#define DDF_UNROLL_NOT
#define DDF_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(::ddf::host::machine().shared_memory())

namespace ddf::host {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

constexpr size_t kRedZone = 256;  // bytes on either side of a tensor and behind shared memory
// Every byte 0xff is a NaN in all four floating-point types.
constexpr unsigned char kPoison = 0xff;

enum class Use { input, result, scratch };  // scratch: written by one kernel, read by the next

// Memory that kernels may access.
class Memory {
 public:
  Memory(unsigned char* begin, size_t bytes, Use use) : begin_(begin), bytes_(bytes), use_(use) {
    if (use != Use::input) written_.assign(bytes, false);
  }

  unsigned char* data() const { return begin_; }
  bool holds(const unsigned char* p, size_t bytes) const {
    return p >= begin_ && p + bytes <= begin_ + bytes_;
  }
  bool overlaps(const unsigned char* p, size_t bytes) const {
    return p < begin_ + bytes_ && begin_ < p + bytes;
  }

  void check_use(const unsigned char* p, size_t bytes, bool write) {
    if (write ? use_ == Use::input : use_ == Use::result) {
      fail(write ? "write to an input" : "read of a result");
    }
    if (use_ == Use::input) return;
    for (size_t i = p - begin_; i < static_cast<size_t>(p - begin_) + bytes; ++i) {
      if (write && written_[i]) fail("byte ", i, " is written twice");
      if (!write && !written_[i]) fail("byte ", i, " of a scratch is read before it is written");
      written_[i] = true;
    }
  }

  void check_complete() const {
    const auto unwritten = std::find(written_.begin(), written_.end(), false);
    if (unwritten != written_.end()) {
      fail("byte ", unwritten - written_.begin(), " is never written");
    }
  }

 protected:
  unsigned char* begin_;
  size_t bytes_;

 private:
  Use use_;
  std::vector<bool> written_;
};

// A copy of a tensor's bytes between red zones, at an address as (mis)aligned as `like`.
class GlobalMemory : private std::vector<unsigned char>, public Memory {
 public:
  GlobalMemory(const void* like, size_t bytes, Use use)
      : vector(bytes + 2 * kRedZone + 2 * kAlignment, kPoison),
        Memory(aligned_as(like), bytes, use) {
    if (use == Use::input) std::memcpy(begin_, like, bytes);
  }

  using Memory::data;

  void check_red_zones() const {
    const auto clean = [](unsigned char byte) { return byte == kPoison; };
    if (!std::all_of(begin_ - kRedZone, begin_, clean) ||
        !std::all_of(begin_ + bytes_, begin_ + bytes_ + kRedZone, clean)) {
      fail("a red zone around a tensor is overwritten");
    }
  }

 private:
  static constexpr size_t kAlignment = 64;

  unsigned char* aligned_as(const void* like) {
    const auto start = reinterpret_cast<uintptr_t>(vector::data()) + kRedZone;
    const auto offset = reinterpret_cast<uintptr_t>(like) % kAlignment;
    return reinterpret_cast<unsigned char*>((start / kAlignment + 1) * kAlignment + offset);
  }
};

enum class Order { forward, backward, shuffled };

class Machine {
 public:
  Order order = Order::forward;  // of blocks and of the threads between two barriers
  std::vector<Memory*> tensors;

  void launch(const std::function<void()>& kernel, int64_t blocks, int threads, size_t shared_bytes,
              size_t parameter_bytes) {
    if (blocks < 1 || blocks > INT32_MAX) fail("CUDA cannot launch ", blocks, " blocks");
    if (threads < 1 || threads > 1024) fail("CUDA cannot launch ", threads, " threads a block");
    if (shared_bytes > 48 << 10) fail("CUDA has no ", shared_bytes, " bytes of shared memory");
    if (parameter_bytes > 4096) fail("CUDA passes no ", parameter_bytes, " bytes of parameters");
    body_ = kernel;
    shared_bytes_ = shared_bytes;
    for (const int64_t block : sequence(blocks)) {
      block_ = block;
      shared_.assign((shared_bytes + kRedZone) / sizeof(Unit) + 1, Unit{});
      std::memset(shared_.data(), kPoison, shared_.size() * sizeof(Unit));
      run_block(threads);
      const auto* const end = reinterpret_cast<const unsigned char*>(shared_.data()) + shared_bytes;
      if (!std::all_of(end, end + kRedZone, [](unsigned char b) { return b == kPoison; })) {
        fail("shared memory is written past its ", shared_bytes, " bytes");
      }
    }
  }

  int thread() const { return current_; }
  int64_t block() const { return block_; }
  void* shared_memory() { return shared_.data(); }

  void barrier() { wait(State::at_barrier); }

  float shuffle_xor(float value, int mask) {
    Fiber& fiber = *fibers_[current_];
    fiber.sent = value;
    fiber.mask = mask;
    wait(State::in_shuffle);
    return fiber.received;
  }

  void check_shared(const float* p, size_t bytes) {
    const auto* const begin = reinterpret_cast<const unsigned char*>(shared_.data());
    const auto* const address = reinterpret_cast<const unsigned char*>(p);
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("misaligned access to shared memory");
    if (address < begin || address + bytes > begin + shared_bytes_) {
      fail("access outside of the ", shared_bytes_, " bytes of shared memory");
    }
  }

  // Copies to shared memory, of zeros from null, are made when the thread waits for their group.
  void copy(float* to, const void* from, size_t bytes) {
    if (from != nullptr) check_access(from, bytes, false);
    check_shared(to, bytes);
    fibers_[current_]->copies.back().push_back({to, from, bytes});
  }
  void end_copies() { fibers_[current_]->copies.emplace_back(); }
  void await_copies(size_t pending) {
    auto& copies = fibers_[current_]->copies;
    while (copies.size() > pending + 1) {
      for (const Copy& copy : copies.front()) {
        if (copy.from == nullptr) {
          std::memset(copy.to, 0, copy.bytes);
        } else {
          std::memcpy(copy.to, copy.from, copy.bytes);
        }
      }
      copies.erase(copies.begin());
    }
  }

  void check_access(const void* address, size_t bytes, bool write) {
    const auto* const p = static_cast<const unsigned char*>(address);
    const char* const action = write ? "write" : "read";
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
      fail("misaligned ", action, " of ", bytes, " bytes");
    }
    for (Memory* const tensor : tensors) {
      if (!tensor->holds(p, bytes)) continue;
      return tensor->check_use(p, bytes, write);
    }
    fail(action, " of ", bytes, " bytes outside of every tensor");
  }

 private:
  enum class State { ready, at_barrier, in_shuffle, done };
  struct Copy {
    float* to;
    const void* from;
    size_t bytes;
  };
  struct Fiber {
    bool is_started = false;
    jmp_buf place;
    std::vector<char> stack = std::vector<char>(kStackBytes);
    std::vector<std::vector<Copy>> copies = std::vector<std::vector<Copy>>(1);  // by groups
    State state;
    float sent, received;
    int mask;
  };
  struct alignas(16) Unit {
    unsigned char bytes[16];
  };
  static constexpr size_t kStackBytes = 64 << 10;
  static constexpr int kWarp = 32;

  void wait(State state) {
    Fiber& fiber = *fibers_[current_];
    fiber.state = state;
    if (_setjmp(fiber.place) == 0) _longjmp(scheduler_, 1);
  }

  // Runs a thread until it waits or is done. A context is used only to start a fiber, once for all
  // blocks; further switches are jumps, because switching contexts calls the operating system to
  // set the signal mask.
  void run_thread(Fiber& fiber) {
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.is_started) _longjmp(fiber.place, 1);
    fiber.is_started = true;
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = fiber.stack.data();
    start.uc_stack.ss_size = fiber.stack.size();
    start.uc_link = nullptr;
    makecontext(&start, enter, 0);
    setcontext(&start);
  }

  int count(State state, int begin, int end) const {
    return std::count_if(fibers_.begin() + begin, fibers_.begin() + end,
                         [&](const auto& fiber) { return fiber->state == state; });
  }

  void release(int begin, int end) {
    for (int i = begin; i < end; ++i) fibers_[i]->state = State::ready;
  }

  // Completes the shuffle of each warp whose threads are all in it; returns whether there was one.
  bool resolve_shuffles(int threads) {
    bool any = false;
    for (int begin = 0; begin < threads; begin += kWarp) {
      const int end = begin + kWarp;
      if (count(State::in_shuffle, begin, std::min(end, threads)) == 0) continue;
      const int mask = fibers_[begin]->mask;
      if (end > threads || mask >= kWarp || count(State::in_shuffle, begin, end) < kWarp) {
        fail("divergent shuffle: not all threads of a warp take part");
      }
      for (int i = begin; i < end; ++i) {
        if (fibers_[i]->mask != mask) fail("divergent shuffle: different masks");
        fibers_[i]->received = fibers_[begin + ((i - begin) ^ mask)]->sent;
      }
      release(begin, end);
      any = true;
    }
    return any;
  }

  std::vector<int64_t> sequence(int64_t count) const {
    std::vector<int64_t> indices(count);
    for (int64_t i = 0; i < count; ++i) indices[i] = i;
    if (order == Order::backward) std::reverse(indices.begin(), indices.end());
    if (order == Order::shuffled) std::shuffle(indices.begin(), indices.end(), std::mt19937(1));
    return indices;
  }

  // Runs the body for each block. An exception must not leave its fiber.
  static void enter();

  void run_block(int threads) {
    try {
      run_threads(threads);
    } catch (...) {
      // Fibers that have not finished the body cannot be used again.
      fibers_.clear();
      throw;
    }
  }

  void run_threads(int threads) {
    while (fibers_.size() < static_cast<size_t>(threads)) {
      fibers_.push_back(std::make_unique<Fiber>());
    }
    release(0, threads);
    const std::vector<int64_t> turns = sequence(threads);
    error_ = nullptr;
    for (;;) {
      for (const int64_t turn : turns) {
        Fiber& fiber = *fibers_[turn];
        current_ = turn;
        if (fiber.state == State::ready) run_thread(fiber);
        if (error_) std::rethrow_exception(error_);
      }
      if (resolve_shuffles(threads)) continue;
      const int waiting = count(State::at_barrier, 0, threads);
      if (waiting == 0) return;
      if (waiting < threads) {
        fail("divergent barrier: ", waiting, " of ", threads, " threads are at it, the others ",
             "have returned");
      }
      release(0, threads);
    }
  }

  std::function<void()> body_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  jmp_buf scheduler_;
  std::vector<Unit> shared_;
  size_t shared_bytes_ = 0;
  std::exception_ptr error_;
  int64_t block_ = 0;
  int current_ = 0;
};

inline Machine& machine() {
  static Machine machine;
  return machine;
}

inline void Machine::enter() {
  Machine& self = machine();
  for (;;) {
    try {
      self.body_();
    } catch (...) {
      self.error_ = std::current_exception();
    }
    self.wait(State::done);
  }
}

}  // namespace ddf::host

namespace ddf::cuda {

using Half = c10::Half;
using BFloat16 = c10::BFloat16;

inline int thread_index() { return host::machine().thread(); }
inline int64_t block_index() { return host::machine().block(); }
inline void sync_threads() { host::machine().barrier(); }
// Synchronizes the threads of a warp, like a shuffle.
inline void sync_warp() { host::machine().shuffle_xor(0.f, 0); }
inline void keep_branches() {}
inline int in_each_iteration(int value) { return value; }
inline float shuffle_xor(float value, int mask) { return host::machine().shuffle_xor(value, mask); }

template <typename T>
using Loaded = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
Loaded<T> load(const T* p) {
  host::machine().check_access(p, sizeof(T), false);
  return static_cast<Loaded<T>>(*p);
}

template <typename T>
void store(T* p, Loaded<T> value) {
  host::machine().check_access(p, sizeof(T), true);
  *p = static_cast<T>(value);
}

template <typename T>
float load_if(const T* p, bool inside) {
  return inside ? load(p) : 0.f;
}
template <typename T>
void load4(float* to, const T* p);
template <typename T>
void load4_if(float* to, const T* p, bool inside) {
  std::fill(to, to + 4, 0.f);
  if (inside) load4(to, p);
}
template <typename T>
void load4(float* to, const T* p) {
  host::machine().check_access(p, 4 * sizeof(T), false);
  for (int i = 0; i < 4; ++i) to[i] = static_cast<float>(p[i]);
}

template <typename T>
void store4(T* p, const float* from) {
  host::machine().check_access(p, 4 * sizeof(T), true);
  for (int i = 0; i < 4; ++i) p[i] = static_cast<T>(from[i]);
}

template <typename T>
void store2(T* p, const float* from) {
  host::machine().check_access(p, 2 * sizeof(T), true);
  for (int i = 0; i < 2; ++i) p[i] = static_cast<T>(from[i]);
}

inline void load_shared4(float* to, const float* p) {
  host::machine().check_shared(p, 16);
  std::copy(p, p + 4, to);
}

inline void store_shared4(float* p, const float* from) {
  host::machine().check_shared(p, 16);
  std::copy(from, from + 4, p);
}

template <int Count, typename T>
void copy_to_shared(float* to, const T* from) {
  host::machine().copy(to, from, Count * sizeof(T));
}
template <int Count, typename T>
void copy_to_shared_if(float* to, const T* from, bool inside) {
  host::machine().copy(to, inside ? from : nullptr, Count * sizeof(T));
}
inline void end_copies() { host::machine().end_copies(); }
template <int Pending>
void await_copies() {
  host::machine().await_copies(Pending);
}
template <typename T>
float load_copied(const float* p, int index) {
  host::machine().check_shared(p, 4);
  return static_cast<float>(reinterpret_cast<const T*>(p)[index]);
}
template <typename T>
void load_copied4(float* to, const float* p) {
  host::machine().check_shared(p, 4 * sizeof(T));
  for (int i = 0; i < 4; ++i) to[i] = static_cast<float>(reinterpret_cast<const T*>(p)[i]);
}

}  // namespace ddf::cuda
