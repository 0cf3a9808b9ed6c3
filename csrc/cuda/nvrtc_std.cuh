// What the kernels' headers use of the C++ standard library, which NVRTC does not bring. It stands
// for <cstdint>, <type_traits> and the others (ddf_mm/ops/nvrtc.py).
#pragma once

using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long;  // as on Linux for 64-bit hosts, by which kernels are named
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned;
using uint64_t = unsigned long;
using uintptr_t = unsigned long;
#define INT32_MAX 2147483647

namespace std {

template <typename T, T Value>
struct integral_constant {
  static constexpr T value = Value;
  constexpr operator T() const { return Value; }
};
using true_type = integral_constant<bool, true>;
using false_type = integral_constant<bool, false>;

template <typename T, typename U>
inline constexpr bool is_same_v = false;
template <typename T>
inline constexpr bool is_same_v<T, T> = true;

template <typename T>
struct numeric_limits {
  static constexpr T infinity() { return __builtin_huge_val(); }
};

// Only declared: functions of the host call them, which NVRTC parses.
template <typename T>
const T& min(const T& a, const T& b);
template <typename T>
const T& clamp(const T& value, const T& low, const T& high);

}  // namespace std
