// A test is a function that registers itself; CHECK counts and reports, THROWS wants std::invalid_argument.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

namespace vivace::test {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Counts {
  long checks = 0, failures = 0;
};

inline Counts& counts() {
  static Counts all;
  return all;
}

inline bool check(bool holds, const std::string& what, const char* file, int line) {
  ++counts().checks;
  if (!holds && ++counts().failures <= 20) std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
  return holds;
}

// The message of the std::invalid_argument that `body` throws; empty when it throws none.
template <typename Body>
std::string refusal(const Body& body) {
  try {
    body();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

}  // namespace vivace::test

#define VV_TEST(name)                                  \
  static void name();                                  \
  static const bool name##_registered = [] {           \
    ::vivace::test::tests().push_back({#name, &name}); \
    return true;                                       \
  }();                                                 \
  static void name()

#define CHECK(condition) ::vivace::test::check(condition, #condition, __FILE__, __LINE__)
#define CHECK_IN(condition, where) \
  ::vivace::test::check(condition, std::string(#condition) + " in " + (where), __FILE__, __LINE__)
