#define NAME "avx2"
#define TABLE quire_kernels_avx2
#include "isa.h"
