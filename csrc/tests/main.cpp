// Runs every test on the instruction set that VIVACE_CPU_ISA names. Exit status: 0 all held, 1 something failed,
// 77 this machine lacks the instruction set.
#include <cstdlib>
#include <stdexcept>

#include "simd/cpu.h"
#include "tests/harness.h"

int main() {
  using namespace vivace;
  const char* wanted = std::getenv("VIVACE_CPU_ISA");
  try {
    std::printf("instruction set: %s\n", kernels().name);
  } catch (const std::invalid_argument& error) {
    std::printf("%s\n", error.what());
    return wanted != nullptr ? 77 : 1;
  }
  for (const test::Test& one : test::tests()) {
    const long before = test::counts().failures;
    try {
      one.run();
    } catch (const std::exception& error) {
      test::check(false, std::string("unexpected exception: ") + error.what(), one.name, 0);
    }
    std::printf("%-4s %s\n", test::counts().failures == before ? "ok" : "FAIL", one.name);
  }
  std::printf("%zu tests, %ld checks, %ld failures\n", test::tests().size(), test::counts().checks,
              test::counts().failures);
  return test::counts().failures == 0 ? 0 : 1;
}
