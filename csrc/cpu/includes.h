// The headers that cpu/kernels.h needs; a file for one instruction set includes them before it
// switches that set on.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/arguments.h"
