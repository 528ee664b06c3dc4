#define NAME "avx512"
#define TABLE quire_kernels_avx512
#include "isa.h"
