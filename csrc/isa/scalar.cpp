// Every kernel for the scalar instruction set.
#define VV_ISA VV_SCALAR
#include "isa/kernels.inl"
