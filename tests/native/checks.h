// Named checks of a native driver: prints "name ok" or "name: what was wrong", one line each.
#pragma once
#include <stdio.h>

#include <functional>
#include <stdexcept>
#include <string>

inline void require(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

// Runs one check; whatever it throws is its verdict.
inline void check(const char* name, const std::function<void()>& body) {
  try {
    body();
    printf("%s ok\n", name);
  } catch (const std::exception& error) {
    printf("%s: %s\n", name, error.what());
  }
}

// The sentence that `body` throws, or "" where it throws none.
inline std::string complaint(const std::function<void()>& body) {
  try {
    body();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}
