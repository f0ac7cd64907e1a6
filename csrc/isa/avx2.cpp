// Every kernel for the avx2 instruction set.
#define VV_ISA VV_AVX2
#include "isa/kernels.inl"
