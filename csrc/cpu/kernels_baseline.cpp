// The kernels for every processor of the architecture: SSE2 on x86-64, NEON on arm64.
#define DDF_ISA baseline
#define DDF_VECTOR_BYTES 16
#include "cpu/kernels.h"
