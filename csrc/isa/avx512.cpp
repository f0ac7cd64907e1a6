// Every kernel for the avx512 instruction set.
#define VV_ISA VV_AVX512
#include "isa/kernels.inl"
