#include "simd/cpu.h"

#include <cstdlib>

#include "core/error.h"

#ifdef VIVACE_X86
#include <cpuid.h>
#endif

namespace vivace {
namespace {

#ifdef VIVACE_X86
// Half-precision conversions; asked for by hand, since older compilers do not know the name "f16c".
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

// What the flags of isa/avx512_bf16.cpp ask for.
bool has_avx512_bf16() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
#endif

std::vector<const Kernels*> available_tables() {
  std::vector<const Kernels*> tables{&scalar::kKernels};
#ifdef VIVACE_X86
  __builtin_cpu_init();  // the supports checks include the operating system's saving of wide registers
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) tables.push_back(&avx2::kKernels);
  if (__builtin_cpu_supports("avx512f")) tables.push_back(&avx512::kKernels);
  if (has_avx512_bf16()) tables.push_back(&avx512_bf16::kKernels);
#endif
  return tables;
}

const Kernels& choose() {
  const auto tables = available_tables();
  const char* wanted = std::getenv("VIVACE_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return *tables.back();
  std::string names;
  for (const Kernels* table : tables) {
    if (std::string(wanted) == table->name) return *table;
    names += (names.empty() ? "" : ", ") + std::string(table->name);
  }
  const std::string name(wanted);
  const bool known = name == "avx2" || name == "avx512" || name == "avx512_bf16";
  fail("VIVACE_CPU_ISA=", name, known ? ": this build or processor cannot run it" : ": no such instruction set",
       "; use one of ", names, " or unset it");
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* table : available_tables()) names.emplace_back(table->name);
  return names;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();  // tried again on the next call when it throws
  return chosen;
}

}  // namespace vivace
