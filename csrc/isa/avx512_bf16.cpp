// Every kernel for the avx512_bf16 instruction set.
#define VV_ISA VV_AVX512_BF16
#include "isa/kernels.inl"
