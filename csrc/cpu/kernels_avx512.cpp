// The kernels for x86-64 processors with AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
// Before the pragma: what these headers define inline may be shared with other files.
#include <immintrin.h>

#include "cpu/includes.h"
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
// What GCC 12's own headers declare.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define DDF_ISA avx512
#define DDF_VECTOR_BYTES 64
#define DDF_F16C 1
#include "cpu/kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
