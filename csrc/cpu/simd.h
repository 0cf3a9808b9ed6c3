// Vectors of the instruction set that the including file chose, and the element types.
// GCC's and clang's vector extensions: one source for SSE, AVX and NEON.
#pragma once
#include "cpu/includes.h"
// Here, not in includes.h: its vectors are those of the instruction set.
#include "combine.h"

#define DDF_INLINE inline __attribute__((always_inline))
// Arrays of vectors stay in registers only if the loops over them are unrolled completely.
#if defined(__clang__)
#define DDF_UNROLL _Pragma("unroll")
#else
#define DDF_UNROLL _Pragma("GCC unroll 16")
#endif
// Hides how a value was computed, so that compilers keep it in a register.
#define DDF_OPAQUE(value) asm("" : "+r"(value))
#if defined(__x86_64__)
#define DDF_OPAQUE_VECTOR(value) asm("" : "+v"(value))
#elif defined(__aarch64__)
#define DDF_OPAQUE_VECTOR(value) asm("" : "+w"(value))
#else
#define DDF_OPAQUE_VECTOR(value)
#endif
// Selects lanes of the concatenation of a and b by index.
#if defined(__clang__) || __GNUC__ >= 12
#define DDF_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DDF_SHUFFLE(a, b, ...) \
  __builtin_shuffle(a, b, Vector<IntegerOf<sizeof(a[0])>, sizeof(a) / sizeof(a[0])>{__VA_ARGS__})
#endif

namespace ddf::cpu::DDF_ISA {
namespace {

template <class A, int N>
struct VectorOf {
  typedef A type __attribute__((vector_size(N * sizeof(A))));
};
template <class A, int N>
using Vector = typename VectorOf<A, N>::type;

template <int kBytes>
using IntegerOf =
    std::conditional_t<kBytes == 8, int64_t, std::conditional_t<kBytes == 2, int16_t, int32_t>>;

// Lanes of a vector of the accumulation type A.
template <class A>
constexpr int kLanes = DDF_VECTOR_BYTES / static_cast<int>(sizeof(A));

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Vector registers: x86 has 32 with AVX-512, otherwise 16.
#if defined(__x86_64__)
constexpr bool kHas32Registers = DDF_VECTOR_BYTES == 64;
#else
constexpr bool kHas32Registers = true;
#endif

// The accumulation type: float for 16-bit types.
template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class To, class From>
DDF_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

DDF_INLINE float widen(float x) { return x; }
DDF_INLINE double widen(double x) { return x; }
DDF_INLINE float widen(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
// Conversions between the bits of a Half in the lower part of each lane and float.
template <int N>
DDF_INLINE Vector<float, N> widen_halves(Vector<int32_t, N> bits) {
  const auto magnitude = (bits & 0x7fff) << 13;
  const auto subnormal = __builtin_convertvector(bits & 0x3ff, Vector<float, N>) * 0x1p-24f;
  const auto normal = magnitude + (112 << 23), not_finite = magnitude + (224 << 23);
  const auto chosen = magnitude < 1 << 23    ? bit_cast<Vector<int32_t, N>>(subnormal)
                      : magnitude < 31 << 23 ? normal
                                             : not_finite;
  return bit_cast<Vector<float, N>>(chosen | (bits & 0x8000) << 16);
}
template <int N>
DDF_INLINE Vector<int32_t, N> narrow_to_halves(Vector<float, N> v) {
  const auto bits = bit_cast<Vector<int32_t, N>>(v);
  const auto magnitude = bits & 0x7fffffff;
  const auto normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 leaves the rounded mantissa in the low bits.
  const auto sum = bit_cast<Vector<float, N>>(magnitude) + 0.5f;
  const auto subnormal = bit_cast<Vector<int32_t, N>>(sum) - 0x3f000000;
  const auto not_finite = ((magnitude > 0x7f800000) & 0x200) | 0x7c00;
  const auto chosen = magnitude < 0x38800000   ? subnormal
                      : magnitude < 0x477ff000 ? normal
                                               : not_finite;
  return chosen | (bits >> 16 & 0x8000);
}

DDF_INLINE float widen(Half x) { return widen_halves<1>(Vector<int32_t, 1>{x.bits})[0]; }

template <class T>
DDF_INLINE T narrow(Accumulate<T> x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fc0};
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
  } else if constexpr (std::is_same_v<T, Half>) {
    return {static_cast<uint16_t>(narrow_to_halves<1>(Vector<float, 1>{x})[0])};
  } else {
    return x;
  }
}

template <class A, int N>
DDF_INLINE Vector<A, N> splat(A value) {
  // Not value + 0, which compilers cannot remove, because it turns -0 into 0.
  return value - Vector<A, N>{};
}

// N elements from memory of any alignment.
template <int N, class T>
DDF_INLINE Vector<Accumulate<T>, N> load(const T* from) {
  using A = Accumulate<T>;
  if constexpr (std::is_same_v<T, A>) {
    Vector<A, N> v;
    std::memcpy(&v, from, sizeof(v));
    return v;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    Vector<uint16_t, N> bits;
    std::memcpy(&bits, from, sizeof(bits));
#if DDF_VECTOR_BYTES == 64
    // GCC 12 converts halves of the vector.
    if constexpr (N == 16)
      return bit_cast<Vector<float, N>>(
          _mm512_slli_epi32(_mm512_cvtepu16_epi32(bit_cast<__m256i>(bits)), 16));
#endif
    return bit_cast<Vector<float, N>>(__builtin_convertvector(bits, Vector<uint32_t, N>) << 16);
  } else {
#if defined(DDF_F16C)
    if constexpr (N == 16) {
#if DDF_VECTOR_BYTES == 64
      return bit_cast<Vector<float, N>>(
          _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#endif
    } else if constexpr (N == 4) {
      return bit_cast<Vector<float, N>>(
          _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
    } else {
      static_assert(N == 8);
      return bit_cast<Vector<float, N>>(
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
    }
#endif
    Vector<uint16_t, N> bits;
    std::memcpy(&bits, from, sizeof(bits));
    return widen_halves<N>(__builtin_convertvector(bits, Vector<int32_t, N>));
  }
}

template <int N, class T>
DDF_INLINE void store(T* to, Vector<Accumulate<T>, N> v) {
  using A = Accumulate<T>;
  if constexpr (std::is_same_v<T, A>) {
    std::memcpy(to, &v, sizeof(v));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const auto bits = bit_cast<Vector<uint32_t, N>>(v);
    const auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const auto is_nan = (bits & 0x7fffffff) > 0x7f800000;
    const auto chosen = is_nan ? splat<uint32_t, N>(0x7fc0) : rounded;
#if DDF_VECTOR_BYTES == 64
    if constexpr (N == 16) {
      const __m256i narrowed = _mm512_cvtepi32_epi16(bit_cast<__m512i>(chosen));
      std::memcpy(to, &narrowed, sizeof(narrowed));
      return;
    }
#endif
    const auto narrowed = __builtin_convertvector(chosen, Vector<uint16_t, N>);
    std::memcpy(to, &narrowed, sizeof(narrowed));
  } else {
#if defined(DDF_F16C)
    constexpr int kRound = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    if constexpr (N == 16) {
#if DDF_VECTOR_BYTES == 64
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                          _mm512_cvtps_ph(bit_cast<__m512>(v), kRound));
      return;
#endif
    } else if constexpr (N == 4) {
      return _mm_storel_epi64(reinterpret_cast<__m128i*>(to),
                              _mm_cvtps_ph(bit_cast<__m128>(v), kRound));
    } else {
      static_assert(N == 8);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                       _mm256_cvtps_ph(bit_cast<__m256>(v), kRound));
      return;
    }
#endif
    const auto narrowed = __builtin_convertvector(narrow_to_halves<N>(v), Vector<uint16_t, N>);
    std::memcpy(to, &narrowed, sizeof(narrowed));
  }
}

// A mask of the first count lanes.
template <class A, int N>
DDF_INLINE auto first_lanes(int64_t count) {
  Vector<A, N> index{};
  for (int i = 0; i < N; ++i) index[i] = static_cast<A>(i);
  return index < splat<A, N>(static_cast<A>(count));
}

// Masked loads and stores access the first lanes alone. AddressSanitizer does not see them.
#if defined(__x86_64__) && !defined(DDF_SANITIZED)
#define DDF_MASK_BYTES DDF_VECTOR_BYTES
#else
#define DDF_MASK_BYTES 0
#endif

#if DDF_MASK_BYTES == 64
// The first count bits.
DDF_INLINE uint32_t first_bits(int64_t count) { return (uint32_t{1} << count) - 1; }
#endif

template <class T>
constexpr bool kHasMaskedLoads =
    DDF_VECTOR_BYTES == 64 || (DDF_VECTOR_BYTES == 32 && sizeof(T) >= 4);

// Copies the first count < N elements, in pieces of a power of two.
template <int N, class T>
DDF_INLINE void copy_some(T* to, const T* from, int64_t count) {
  if constexpr (N > 1) {
    constexpr int kHalf = N / 2;
    if (count & kHalf) {
      std::memcpy(to, from, kHalf * sizeof(T));
      to += kHalf;
      from += kHalf;
    }
    copy_some<kHalf>(to, from, count);
  }
}

// The first count < N elements (with masks of AVX-512, <= N); the other lanes are zero. Memory
// after them is not accessed.
template <int N, class T>
DDF_INLINE Vector<Accumulate<T>, N> load_some(const T* from, int64_t count) {
#if DDF_MASK_BYTES == 64
  if constexpr (std::is_same_v<T, float> && N == 16)
    return bit_cast<Vector<float, N>>(
        _mm512_maskz_loadu_ps(static_cast<__mmask16>(first_bits(count)), from));
  else if constexpr (std::is_same_v<T, double> && N == 8)
    return bit_cast<Vector<double, N>>(
        _mm512_maskz_loadu_pd(static_cast<__mmask8>(first_bits(count)), from));
  else if constexpr (sizeof(T) == 2 && N == 16) {
    const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(first_bits(count)), from);
    T values[N];
    std::memcpy(values, &bits, sizeof(bits));
    return load<N>(values);
  }
#elif DDF_MASK_BYTES == 32
  if constexpr (std::is_same_v<T, float> && N == 8)
    return bit_cast<Vector<float, N>>(
        _mm256_maskload_ps(from, bit_cast<__m256i>(first_lanes<float, N>(count))));
  else if constexpr (std::is_same_v<T, double> && N == 4)
    return bit_cast<Vector<double, N>>(
        _mm256_maskload_pd(from, bit_cast<__m256i>(first_lanes<double, N>(count))));
#endif
  T values[N] = {};
  copy_some<N>(values, from, count);
  return load<N>(values);
}

template <int N, class T>
DDF_INLINE void store_some(T* to, Vector<Accumulate<T>, N> v, int64_t count) {
#if DDF_MASK_BYTES == 64
  if constexpr (std::is_same_v<T, float> && N == 16)
    return _mm512_mask_storeu_ps(to, static_cast<__mmask16>(first_bits(count)),
                                 bit_cast<__m512>(v));
  else if constexpr (std::is_same_v<T, double> && N == 8)
    return _mm512_mask_storeu_pd(to, static_cast<__mmask8>(first_bits(count)),
                                 bit_cast<__m512d>(v));
#elif DDF_MASK_BYTES == 32
  if constexpr (std::is_same_v<T, float> && N == 8)
    return _mm256_maskstore_ps(to, bit_cast<__m256i>(first_lanes<float, N>(count)),
                               bit_cast<__m256>(v));
  else if constexpr (std::is_same_v<T, double> && N == 4)
    return _mm256_maskstore_pd(to, bit_cast<__m256i>(first_lanes<double, N>(count)),
                               bit_cast<__m256d>(v));
#endif
  T values[N];
  store<N>(values, v);
  copy_some<N>(to, values, count);
}

// The first count of N elements; the others are zero, or stay as they are in memory.
template <int N, class T>
DDF_INLINE Vector<Accumulate<T>, N> load_first(const T* from, int64_t count) {
  return count >= N ? load<N>(from) : load_some<N>(from, count);
}

// The first count <= N elements, without a branch where there are masks.
template <int N, class T>
DDF_INLINE Vector<Accumulate<T>, N> load_up_to(const T* from, int64_t count) {
  return DDF_MASK_BYTES == 64 ? load_some<N>(from, count) : load_first<N>(from, count);
}

template <int N, class T>
DDF_INLINE void store_first(T* to, Vector<Accumulate<T>, N> v, int64_t count) {
  if (count >= N)
    store<N>(to, v);
  else
    store_some<N>(to, v, count);
}

// Vectors of N elements that are not widened.
template <class T>
using Raw = std::conditional_t<sizeof(T) == 2, uint16_t, T>;
template <class T, int N>
using RawVector = Vector<Raw<T>, N>;

template <int N, class T>
DDF_INLINE RawVector<T, N> splat_element(T value) {
  return splat<Raw<T>, N>(bit_cast<Raw<T>>(value));
}

template <class T, int N>
DDF_INLINE Vector<Accumulate<T>, N> widen_elements(RawVector<T, N> v) {
  T elements[N];
  std::memcpy(elements, &v, sizeof(v));
  return load<N>(elements);
}

// Some of the lanes of a RawVector.
#if DDF_MASK_BYTES == 64
template <class T, int N>
using LaneMask = std::conditional_t<N == 16, __mmask16, __mmask8>;
#else
template <class T, int N>
using LaneMask = Vector<IntegerOf<sizeof(T)>, N>;
#endif

// The lanes from `first` on.
template <class T, int N>
DDF_INLINE LaneMask<T, N> lanes_from(int64_t first) {
#if DDF_MASK_BYTES == 64
  return static_cast<LaneMask<T, N>>(~first_bits(first));
#else
  return ~first_lanes<IntegerOf<sizeof(T)>, N>(first);
#endif
}

// a in the lanes of the mask, b in the others.
template <class T, int N>
DDF_INLINE RawVector<T, N> select_lanes(LaneMask<T, N> mask, RawVector<T, N> a, RawVector<T, N> b) {
#if DDF_MASK_BYTES == 64
  if constexpr (sizeof(T) == 2)
    return bit_cast<RawVector<T, N>>(
        _mm256_mask_mov_epi16(bit_cast<__m256i>(b), mask, bit_cast<__m256i>(a)));
  else if constexpr (sizeof(T) == 4)
    return bit_cast<RawVector<T, N>>(
        _mm512_mask_mov_ps(bit_cast<__m512>(b), mask, bit_cast<__m512>(a)));
  else
    return bit_cast<RawVector<T, N>>(
        _mm512_mask_mov_pd(bit_cast<__m512d>(b), mask, bit_cast<__m512d>(a)));
#else
  return mask ? a : b;
#endif
}

// exp(x) for x <= 0, and NaN for NaN; 0 where it is less than the least normal number.
template <class A, int N>
DDF_INLINE Vector<A, N> exp_of_negative(Vector<A, N> x) {
  if constexpr (std::is_same_v<A, double>) {
    for (int i = 0; i < N; ++i) x[i] = std::exp(x[i]);
    return x;
  } else {
    // x = n * log(2) + r with an integer n, so exp(x) = 2^n * exp(r). Added to kRound, n is rounded
    // and stays in the low bits; log(2) is split, so that the first product is exact.
    constexpr float kRound = 12582912, kLog2 = 0.693359375f, kLog2Rest = -2.12194440e-4f;
    const auto shifted = x * 1.44269504f + kRound;
    const auto n = shifted - kRound;
    const auto r = (x - n * kLog2) - n * kLog2Rest;
    // The Taylor series of exp at 0, |r| <= log(2) / 2: the next term is less than 6e-9.
    auto power = splat<float, N>(1.f / 5040);
    for (const float divisor : {720, 120, 24, 6, 2, 1, 1}) power = power * r + 1 / divisor;
    const auto scale = (bit_cast<Vector<uint32_t, N>>(shifted) + 127) << 23;
    return x < -87.3f ? Vector<A, N>{} : power * bit_cast<Vector<float, N>>(scale);
  }
}

// Lane i is taken from a if bit H of i is clear, otherwise from b, at index i with that bit cleared
// (kUpper: set).
template <int H, bool kUpper, class V, int... I>
DDF_INLINE V pick_lanes(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int kN = sizeof...(I);
  return DDF_SHUFFLE(a, b, ((I & H ? kN : 0) + (kUpper ? I | H : I & ~H))...);
}

// to[i] = the sum of the lanes of v[i], for K vectors, K a power of two: log2(K) rounds halve the
// number of vectors, each with twice as many of the sums.
template <class A, int L, int K, int H = 1>
DDF_INLINE void sum_lanes_of_each(const Vector<A, L> (&v)[K], A* to) {
  static_assert((K & (K - 1)) == 0);
  if constexpr (K > 1 && H < L) {
    Vector<A, L> halves[K / 2];
    constexpr auto kLanesOf = std::make_integer_sequence<int, L>();
    DDF_UNROLL
    for (int k = 0; k < K / 2; ++k)
      halves[k] = pick_lanes<H, false>(v[2 * k], v[2 * k + 1], kLanesOf) +
                  pick_lanes<H, true>(v[2 * k], v[2 * k + 1], kLanesOf);
    sum_lanes_of_each<A, L, K / 2, 2 * H>(halves, to);
  } else if constexpr (H == L) {
    for (int k = 0; k < K; ++k) store<L>(to + k * L, v[k]);
  } else {
    A lanes[L];
    std::memcpy(lanes, &v[0], sizeof(lanes));
    for (int half = L / 2; half >= H; half /= 2)
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    std::copy_n(lanes, H, to);
  }
}

// Lanes first, first + 2, ... of a and b.
template <int kFirst, class V, int... I>
DDF_INLINE V every_other(V a, V b, std::integer_sequence<int, I...>) {
  return DDF_SHUFFLE(a, b, (2 * I + kFirst)...);
}

#if defined(__clang__) || __GNUC__ >= 12
constexpr bool kCanConcatenate = true;
// The lanes of a, then those of b.
template <class V, int... I>
DDF_INLINE auto concatenate(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, I...);
}
#else
constexpr bool kCanConcatenate = false;
template <class V, class Lanes>
V concatenate(V, V, Lanes);
#endif

// Interleaves the lanes of a and b, starting at lane kFirst.
template <int kFirst, class V, int... I>
DDF_INLINE V interleave_lanes(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int kN = sizeof...(I);
  return DDF_SHUFFLE(a, b, (I / 2 + kFirst + (I % 2 ? kN : 0))...);
}

// to[2 * i] = even[i] and to[2 * i + 1] = odd[i], for the first count elements of to.
template <class T>
DDF_INLINE void store_interleaved(T* to, const T* even, const T* odd, int64_t count) {
  using Raw = std::conditional_t<sizeof(T) == 2, int16_t, T>;
  constexpr int kN = DDF_VECTOR_BYTES / static_cast<int>(sizeof(T));
  constexpr auto kLanesOf = std::make_integer_sequence<int, kN>();
  int64_t i = 0;
  for (; 2 * (i + kN) <= count; i += kN) {
    Vector<Raw, kN> a, b;
    std::memcpy(&a, even + i, sizeof(a));
    std::memcpy(&b, odd + i, sizeof(b));
    const auto low = interleave_lanes<0>(a, b, kLanesOf),
               high = interleave_lanes<kN / 2>(a, b, kLanesOf);
    std::memcpy(to + 2 * i, &low, sizeof(low));
    std::memcpy(to + 2 * i + kN, &high, sizeof(high));
  }
  if constexpr (sizeof(T) >= 4 && kHasMaskedLoads<T>)
    if (const int64_t rest = count - 2 * i; rest > 8) {
      const auto a = load_first<kN>(even + i, (rest + 1) / 2), b = load_some<kN>(odd + i, rest / 2);
      store_first<kN>(to + 2 * i, interleave_lanes<0>(a, b, kLanesOf), rest);
      if (rest > kN)
        store_some<kN>(to + 2 * i + kN, interleave_lanes<kN / 2>(a, b, kLanesOf), rest - kN);
      return;
    }
  // Not (i % 2 ? odd : even)[i / 2], from which GCC 12 makes wrong code under its sanitizers.
  for (; 2 * i < count; ++i) {
    to[2 * i] = even[i];
    if (2 * i + 1 < count) to[2 * i + 1] = odd[i];
  }
}

// Rows of count elements, widened. The last vector of a row overlaps the one before it.
template <class T>
DDF_INLINE void load_rows(Accumulate<T>* to, int64_t to_pitch, const T* from, int64_t from_pitch,
                          int64_t rows, int64_t count) {
  constexpr int kN = kLanes<Accumulate<T>>;
  // Conversion from Half takes whole vectors.
  constexpr int kHalf = std::is_same_v<T, Half> ? kN : std::max(kN / 2, 1);
  const auto for_each_row = [&](const auto& load_one) __attribute__((always_inline)) {
    for (int64_t i = 0; i < rows; ++i) load_one(to + i * to_pitch, from + i * from_pitch);
  };
  if (count >= kN)
    for_each_row([&](Accumulate<T>* line, const T* values) __attribute__((always_inline)) {
      for (int64_t i = 0; i + kN <= count; i += kN) store<kN>(line + i, load<kN>(values + i));
      if (count % kN) store<kN>(line + count - kN, load<kN>(values + count - kN));
    });
  else if (count >= kHalf)
    for_each_row([&](Accumulate<T>* line, const T* values) __attribute__((always_inline)) {
      const auto last = load<kHalf>(values + count - kHalf);
      store<kHalf>(line, load<kHalf>(values));
      store<kHalf>(line + count - kHalf, last);
    });
  else
    for_each_row([&](Accumulate<T>* line, const T* values) __attribute__((always_inline)) {
      for (int64_t i = 0; i < count; ++i) line[i] = widen(values[i]);
    });
}

// What the caches of a processor hold; prefetching more than that was faster on an AMD EPYC.
constexpr int64_t kCacheBytes = 12 * 1024 * 1024;

// Prefetches rows of elements, into the L2 cache or into both.
template <int kLocality = 2, class T>
DDF_INLINE void prefetch_rows(const T* from, int64_t pitch, int64_t rows, int64_t count) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  if (pitch == count) {
    count *= rows;
    rows = 1;
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < count; j += kLine)
      __builtin_prefetch(from + i * pitch + j, 0, kLocality);
}

// Rows of count elements, narrowed. May load up to a vector after those of a row.
template <class T>
void store_rows(T* to, int64_t to_pitch, const Accumulate<T>* from, int64_t from_pitch,
                int64_t rows, int64_t count) {
  constexpr int kN = kLanes<Accumulate<T>>;
  for (int64_t r = 0; r < rows; ++r, to += to_pitch, from += from_pitch) {
    int64_t i = 0;
    for (; i + kN <= count; i += kN) store<kN>(to + i, load<kN>(from + i));
    if (i < count) store_some<kN>(to + i, load<kN>(from + i), count - i);
  }
}

// count elements that lie `step` apart, widened.
template <class T>
DDF_INLINE void load_row(Accumulate<T>* to, const T* from, int64_t count, int64_t step) {
  constexpr int kN = kLanes<Accumulate<T>>;
  if (step == 1) return load_rows(to, 0, from, 0, 1, count);
  int64_t i = 0;
  if (step == 2) {
    constexpr auto kAll = std::make_integer_sequence<int, kN>();
    // Not <=: the element after the last may be outside the tensor.
    for (; i + kN < count; i += kN)
      store<kN>(to + i, every_other<0>(load<kN>(from + 2 * i), load<kN>(from + 2 * i + kN), kAll));
    if constexpr (kHasMaskedLoads<T>)
      if (count - i > 4) {
        const int64_t length = 2 * (count - i) - 1;
        const auto low = load_first<kN>(from + 2 * i, length);
        const auto high = load_some<kN>(from + 2 * i + kN, std::max<int64_t>(length - kN, 0));
        return store_first<kN>(to + i, every_other<0>(low, high, kAll), count - i);
      }
  }
  for (; i < count; ++i) to[i] = widen(from[i * step]);
}

// Transposes 4 x 4 lanes, in each group of four lanes.
template <class V, int... I>
DDF_INLINE void transpose_lanes(V (&v)[4], std::integer_sequence<int, I...>) {
  constexpr int kN = sizeof...(I);
  // Lanes of two vectors in turn, from the lower or the upper half of each group.
  const auto halves = [](V a, V b, auto upper) __attribute__((always_inline)) {
    return DDF_SHUFFLE(a, b, (I / 4 * 4 + I % 4 / 2 + 2 * decltype(upper)::value + I % 2 * kN)...);
  };
  // Pairs of lanes.
  const auto pairs = [](V a, V b, auto upper) __attribute__((always_inline)) {
    return DDF_SHUFFLE(a, b, (I / 4 * 4 + I % 2 + 2 * decltype(upper)::value + I % 4 / 2 * kN)...);
  };
  const std::false_type lower;
  const std::true_type upper;
  const V low0 = halves(v[0], v[1], lower), high0 = halves(v[0], v[1], upper);
  const V low1 = halves(v[2], v[3], lower), high1 = halves(v[2], v[3], upper);
  v[0] = pairs(low0, low1, lower);
  v[1] = pairs(low0, low1, upper);
  v[2] = pairs(high0, high1, lower);
  v[3] = pairs(high0, high1, upper);
}

// Addresses base + i * step in base, step and 3 * step alone: x86 scales an index by 1, 2, 4 or 8.
// Hiding the base in a loop keeps compilers from computing each of them before it, which needs
// more registers than there are.
struct Steps {
  int64_t step, step3;

  DDF_INLINE explicit Steps(int64_t step) : step(step), step3(3 * step) { DDF_OPAQUE(step3); }
  template <class T>
  DDF_INLINE T* operator()(T* base, int i) const {
    base += i / 4 * (4 * step);
    return i % 4 == 3 ? base + step3 : base + i % 4 * step;
  }
};

// The lanes of kGroups vectors of 4 lanes, load(0), load(1) ...
template <int kGroups, class Load>
DDF_INLINE auto load_groups(const Load& load) {
  const auto first = load(0);
  if constexpr (kGroups == 1) {
    return first;
  } else if constexpr (kGroups == 2) {
    return concatenate(first, load(1), std::make_integer_sequence<int, 8>());
  } else {
#if DDF_VECTOR_BYTES == 64
    // GCC 12 does not insert from memory otherwise.
    const auto cast = [](const auto& v)
                          __attribute__((always_inline)) { return bit_cast<__m128>(v); };
    __m512 v = _mm512_castps128_ps512(cast(first));
    v = _mm512_insertf32x4(v, cast(load(1)), 1);
    v = _mm512_insertf32x4(v, cast(load(2)), 2);
    return bit_cast<Vector<float, 16>>(_mm512_insertf32x4(v, cast(load(3)), 3));
#endif
  }
}

// to[j * to_pitch + i] = from[i * from_pitch + j] for rows x columns elements, converted.
template <class To, class From>
void transpose(To* to, int64_t to_pitch, const From* from, int64_t from_pitch, int64_t rows,
               int64_t columns) {
  using A = Accumulate<From>;
  // Blocks of 4 x 4, or several times as many rows or columns in vectors of as many more lanes.
  constexpr int kN = 4;
  constexpr int kGroups = kCanConcatenate && sizeof(A) == 4 ? DDF_VECTOR_BYTES / 16 : 1;
  constexpr int kLanesOf = kGroups * kN;
  using V = Vector<A, kLanesOf>;
  constexpr auto kAll = std::make_integer_sequence<int, kLanesOf>();
  const Steps from_row(from_pitch), to_row(to_pitch);
  // Stores of a few cache lines that are far apart are waited for, unless prefetched. Loads are
  // not.
  constexpr int64_t kFar = 512 / sizeof(To), kLine = 64 / sizeof(To);
  const bool writes_far = to_pitch > kFar && rows > kLine;
  const int64_t end = (rows - 1) * from_pitch + columns;
  // Whether all columns of a block are there, and may be loaded, are integral constants.
  const auto block = [&](int64_t i, int64_t j, auto whole,
                         auto loaded) __attribute__((always_inline)) {
    constexpr bool kWhole = decltype(whole)::value, kLoaded = decltype(loaded)::value;
    const From* at = from + i * from_pitch + j;
    To* into = to + j * to_pitch + i;
    DDF_OPAQUE(at);
    DDF_OPAQUE(into);
    if (writes_far && i % kLine == 0)
      for (int n = 0; n < kN; ++n) __builtin_prefetch(to_row(into, n) + kLine, 1);
    V v[kN];
    DDF_UNROLL
    for (int n = 0; n < kN; ++n)
      v[n] = load_groups<kGroups>([&](int k) __attribute__((always_inline)) {
        const From* four = from_row(at, k * kN + n);
        return kLoaded ? load<kN>(four) : load_first<kN>(four, columns - j);
      });
    transpose_lanes(v, kAll);
    DDF_UNROLL
    for (int n = 0; n < kN; ++n)
      if (kWhole || j + n < columns) store<kLanesOf>(to_row(into, n), v[n]);
  };
  // Lines that are far apart are stored in few streams; more of them than a cache has ways push
  // each other out if a power of two lies between them.
  const bool collides = to_pitch * static_cast<int64_t>(sizeof(To)) % 4096 == 0;
  const int64_t streams = to_pitch <= from_pitch ? columns : collides ? 2 * kN : 4 * kN;
  const int64_t whole_rows = rows / kLanesOf * kLanesOf;
  // The columns [first, last) of `parts` blocks of rows, an integral constant.
  const auto blocks = [&](int64_t i, int64_t first, int64_t last,
                          auto parts) __attribute__((always_inline)) {
    constexpr int kParts = decltype(parts)::value;
    const std::true_type yes;
    const std::false_type no;
    int64_t j = first;
    for (; j + kN <= last; j += kN) DDF_UNROLL
    for (int p = 0; p < kParts; ++p) block(i + p * kLanesOf, j, yes, yes);
    for (int p = 0; p < kParts; ++p, i += kLanesOf)
      // A single column is not worth a block.
      if (j + 1 == last)
        for (int n = 0; n < kLanesOf; ++n)
          to[j * to_pitch + i + n] = narrow<To>(widen(from[(i + n) * from_pitch + j]));
      // Elements after those of a row are loaded if they belong to other rows.
      else if (j < last && (i + kLanesOf - 1) * from_pitch + j + kN <= end)
        block(i, j, no, yes);
      else if (j < last)
        block(i, j, no, no);
  };
  // Blocks of rows that fill a cache line.
  constexpr int kParts = std::max<int>(static_cast<int>(kLine) / kLanesOf, 1);
  for (int64_t first = 0; first < columns; first += streams) {
    const int64_t last = std::min(first + streams, columns);
    int64_t i = 0;
    for (; i + kParts * kLanesOf <= rows; i += kParts * kLanesOf)
      blocks(i, first, last, std::integral_constant<int, kParts>());
    for (; kParts > 1 && i < whole_rows; i += kLanesOf)
      blocks(i, first, last, std::integral_constant<int, 1>());
  }
  // `height` is an integral constant, at most kN.
  const auto store_block = [&](int64_t i, int64_t j, auto height) __attribute__((always_inline)) {
    constexpr int kHeight = decltype(height)::value;
    V v[kN] = {};
    DDF_UNROLL
    for (int n = 0; n < kHeight; ++n) v[n] = load<kLanesOf>(from + (i + n) * from_pitch + j);
    transpose_lanes(v, kAll);
    DDF_UNROLL
    for (int g = 0; g < kGroups; ++g) DDF_UNROLL
    for (int n = 0; n < kN; ++n) {
      Vector<A, kN> group;
      std::memcpy(&group, reinterpret_cast<const A*>(&v[n]) + g * kN, sizeof(group));
      To* const column = to + (j + g * kN + n) * to_pitch + i;
      // What is stored after the elements of a column is overwritten by the next column.
      const bool is_overlapping =
          to_pitch == kHeight && (j + g * kN + n) * to_pitch + kN <= columns * to_pitch;
      if (kHeight == kN || is_overlapping)
        store<kN>(column, group);
      else
        store_some<kN>(column, group, kHeight);
    }
  };
  int64_t i = whole_rows, j = 0;
  for (; j + kLanesOf <= columns; j += kLanesOf) {
    for (i = whole_rows; i + kN <= rows; i += kN)
      store_block(i, j, std::integral_constant<int, kN>());
    if (rows - i == 3) store_block(i, j, std::integral_constant<int, 3>());
    if (rows - i == 2) store_block(i, j, std::integral_constant<int, 2>());
    if (rows - i == 1) store_block(i, j, std::integral_constant<int, 1>());
  }
  for (i = whole_rows; i < rows; ++i)
    for (int64_t column = j; column < columns; ++column)
      to[column * to_pitch + i] = narrow<To>(widen(from[i * from_pitch + column]));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// An array, aligned to cache lines, of zeros unless they are said not to be needed.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t count, bool needs_zeros = true)
      : data_(static_cast<A*>(::operator new(static_cast<size_t>(count) * sizeof(A), kLine))) {
    if (needs_zeros) std::fill(data_, data_ + count, A{});
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { ::operator delete(data_, kLine); }
  A* get() { return data_; }
  operator A*() { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  A* data_;
};

// Runs body(begin, end) in parallel.
template <class F>
void parallel(ParallelFor run, int64_t count, const F& body) {
  run(
      count,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const F*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Partition of the work by image, tile of rows, filter group and channel block. It depends on the
// sizes only, so that results do not depend on the number of threads.
struct Plan {
  int64_t rows, tiles;
  int64_t block_channels, channel_blocks;
  int64_t items;

  struct Item {
    int64_t image, tile, row0, row1, group, channel_block, channel0, channel1;
  };

  static constexpr int64_t kL1Bytes = 48 * 1024;

  // row_bytes: memory that a tile needs per row. A tile has as many rows as fit in cache_bytes, but
  // no more than in the L1 cache where there are too few groups to fill the items.
  // shared_row_bytes: a row of tensors in which the groups of a pixel are adjacent, so that the
  // groups of a tile use the same cache lines; 0 if they are not.
  Plan(const Geometry& g, int64_t row_bytes, int64_t shared_row_bytes = 0,
       int64_t cache_bytes = kL1Bytes) {
    constexpr int64_t kSharedBytes = 512 * 1024;
    // Enough items for many cores, but each partial sum stays under 1 % of the unfolded features.
    constexpr int64_t kItems = 32, kSparse = 128;
    const auto tiles_in = [&](int64_t bytes) {
      int64_t fitting = std::max<int64_t>(1, bytes / row_bytes);
      if (shared_row_bytes && g.groups > 1)
        fitting = std::clamp<int64_t>(kSharedBytes / shared_row_bytes, 1, fitting);
      return std::min(ceil_div(g.out_height, fitting),
                      std::max<int64_t>(1, g.out_height * g.out_width / kSparse));
    };
    tiles = std::max(tiles_in(cache_bytes),
                     std::min(tiles_in(kL1Bytes), ceil_div(kItems, g.batch * g.groups)));
    rows = ceil_div(g.out_height, tiles);
    tiles = ceil_div(g.out_height, rows);
    const int64_t needed = ceil_div(kItems, g.batch * tiles * g.groups);
    block_channels =
        std::max(ceil_div(g.group_channels, needed), std::min(kSparse, g.group_channels));
    channel_blocks = ceil_div(g.group_channels, block_channels);
    items = g.batch * tiles * g.groups * channel_blocks;
  }

  Item item(const Geometry& g, int64_t index) const {
    Item i;
    i.channel_block = index % channel_blocks;
    index /= channel_blocks;
    i.group = index % g.groups;
    index /= g.groups;
    i.tile = index % tiles;
    i.image = index / tiles;
    i.row0 = i.tile * rows;
    i.row1 = std::min(i.row0 + rows, g.out_height);
    i.channel0 = i.group * g.group_channels + i.channel_block * block_channels;
    i.channel1 = std::min(i.channel0 + block_channels, (i.group + 1) * g.group_channels);
    return i;
  }
};

// Bytes of a row of channels_last outputs and spatial filters, and of their gradients or of the
// features, as Plan takes them.
template <class T>
int64_t shared_row_bytes(const Geometry& g) {
  const int64_t pixels = g.stride * g.width + g.out_width;
  return (pixels * g.channels + 2 * g.out_width * g.groups * g.taps()) *
         static_cast<int64_t>(sizeof(T));
}

// Adds `number` partial sums of `count` values, `step` apart, in order.
template <class T>
void reduce_partials(T* to, int64_t stride, const Accumulate<T>* partials, int64_t number,
                     int64_t step, int64_t count) {
  constexpr int L = kLanes<Accumulate<T>>;
  int64_t i = 0;
  for (; stride == 1 && i + L <= count; i += L) {
    auto sum = load<L>(partials + i);
    for (int64_t p = 1; p < number; ++p) sum += load<L>(partials + p * step + i);
    store<L>(to + i, sum);
  }
  for (; i < count; ++i) {
    Accumulate<T> sum = 0;
    for (int64_t p = 0; p < number; ++p) sum += partials[p * step + i];
    to[i * stride] = narrow<T>(sum);
  }
}

// Partial sums of grad_channel, of each tile. Those of a single tile are the gradient, unless it
// needs rounding.
template <class T>
class ChannelPartials {
  using A = Accumulate<T>;

 public:
  ChannelPartials(const Backward& b, const Geometry& g, const Plan& plan)
      : g_(g),
        tiles_(plan.tiles),
        gradient_(static_cast<T*>(b.grad_channel)),
        is_whole_(plan.tiles == 1 && std::is_same_v<T, A> && b.grad_channel),
        tile_partials_(is_whole_ ? 0 : g.batch * plan.tiles * g.channels * g.taps()),
        partials_(is_whole_ ? static_cast<A*>(b.grad_channel) : tile_partials_.get()) {}

  // The taps of a channel of one of batch * subpixels images.
  A* at(int64_t image, int64_t tile, int64_t channel) const {
    return partials_ + ((image * tiles_ + tile) * g_.channels + channel) * g_.taps();
  }

  // Of `count` channels, from[blocks of L channels][taps][L].
  void add_blocks(int64_t image, int64_t tile, int64_t channel, int64_t count,
                  const A* from) const {
    constexpr int64_t L = kLanes<A>;
    const int64_t taps = g_.taps();
    A* to = at(image, tile, channel);
    for (int64_t c = 0; c < count; c += L, to += taps * L)
      transpose(to, taps, from + c * taps, L, taps, std::min(L, count - c));
  }

  // Stores the gradient.
  void write(ParallelFor run) const {
    if (gradient_ == nullptr || is_whole_) return;
    parallel(run, g_.batch * g_.channels, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index)
        reduce_partials(gradient_ + index * g_.taps(), 1,
                        at(index / g_.channels, 0, index % g_.channels), tiles_,
                        g_.channels * g_.taps(), g_.taps());
    });
  }

 private:
  const Geometry g_;
  const int64_t tiles_;
  T* const gradient_;
  const bool is_whole_;
  Scratch<A> tile_partials_;
  A* const partials_;
};

// grad_spatial, or partial sums of it of each block of channels, if there are several:
// [channel_blocks][images][groups][Ho][taps][Wo].
template <class T>
class SpatialPartials {
  using A = Accumulate<T>;

 public:
  // is_in_place: rows are [Wo][taps] here and in the gradient, which has the type of the sums.
  SpatialPartials(const Backward& b, const Geometry& g, const Plan& plan, bool is_in_place = false)
      : g_(g),
        is_in_place_(is_in_place),
        gradient_(static_cast<T*>(b.grad_spatial)),
        strides_(b.grad_spatial_strides),
        number_(plan.channel_blocks),
        rows_(g.batch * g.groups * g.out_height),
        partials_(is_split() ? number_ * rows_ * row_size() : 0, false) {}

  // Uninitialized sums of a row of a group of one of batch * subpixels images, [taps][Wo], or null
  // if write_row is to store them.
  A* at(int64_t channel_block, int64_t image, int64_t group, int64_t row) {
    const int64_t index = (image * g_.groups + group) * g_.out_height + row;
    if (is_split()) return partials_ + (channel_block * rows_ + index) * row_size();
    if constexpr (std::is_same_v<T, A>)
      if (is_in_place_ && gradient_) return gradient_of_row(image, group, row);
    return nullptr;
  }

  // Adds such a row, from[taps][pitch].
  void add(int64_t channel_block, int64_t image, int64_t group, int64_t row, const A* from,
           int64_t pitch) {
    A* const to = at(channel_block, image, group, row);
    if (to == nullptr) return write_row(image, group, row, from, pitch);
    for (int64_t t = 0; t < g_.taps(); ++t)
      std::copy_n(from + t * pitch, g_.out_width, to + t * g_.out_width);
  }

  // Stores the gradient of a row.
  void write_row(int64_t image, int64_t group, int64_t row, const A* from, int64_t pitch) const {
    if (gradient_ == nullptr) return;
    T* const to = gradient_of_row(image, group, row);
    if (strides_.tap == 1)
      transpose(to, strides_.column, from, pitch, g_.taps(), g_.out_width);
    else
      for (int64_t t = 0; t < g_.taps(); ++t)
        reduce_partials(to + t * strides_.tap, strides_.column, from + t * pitch, 1, 0,
                        g_.out_width);
  }

  // Stores the sums of the partial sums.
  void write(ParallelFor run) {
    if (!is_split()) return;
    parallel(run, rows_, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        A* const sums = partials_ + index * row_size();
        const auto reduce = [&](auto* to) {
          reduce_partials(to, 1, sums, number_, rows_ * row_size(), row_size());
        };
        const int64_t row = index % g_.out_height, group = index / g_.out_height % g_.groups;
        const int64_t image = index / g_.out_height / g_.groups;
        if (is_in_place_) {
          reduce(gradient_of_row(image, group, row));
        } else {
          reduce(sums);
          write_row(image, group, row, sums, g_.out_width);
        }
      }
    });
  }

 private:
  bool is_split() const { return gradient_ && number_ > 1; }
  int64_t row_size() const { return g_.taps() * g_.out_width; }
  T* gradient_of_row(int64_t image, int64_t group, int64_t row) const {
    return gradient_ + strides_.start(image, g_.subpixels()) + group * g_.taps() * strides_.tap +
           row * strides_.row;
  }

  const Geometry g_;
  const bool is_in_place_;
  T* const gradient_;
  const SpatialStrides strides_;
  const int64_t number_, rows_;
  Scratch<A> partials_;
};

}  // namespace
}  // namespace ddf::cpu::DDF_ISA
