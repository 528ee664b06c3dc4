#define NAME "avx512_bf16"
#define TABLE quire_kernels_avx512_bf16
#include "isa.h"
