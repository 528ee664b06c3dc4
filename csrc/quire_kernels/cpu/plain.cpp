#define NAME "plain"
#define TABLE quire_kernels_plain
#include "isa.h"
