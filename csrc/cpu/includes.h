// Headers for cpu/kernels.h. A file for one instruction set includes them before it enables that
// set.
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
