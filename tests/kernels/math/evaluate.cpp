// Evaluates a function of csrc/core/math.h: evaluate NAME float|double < values > results, both raw. Compiled by test_math.py
// once per instruction set.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "core/math.h"

using namespace iumad::IUMAD_ISA;

template <class F>
Vec<F> apply(const char* name, Vec<F> x) {
  if (!std::strcmp(name, "log")) return iumad::IUMAD_ISA::log<F>(x);
  if (!std::strcmp(name, "cos")) return cos_sin_turns<F>(x).cos;
  if (!std::strcmp(name, "sin")) return cos_sin_turns<F>(x).sin;
  if (!std::strcmp(name, "exp")) return iumad::IUMAD_ISA::exp<F>(x);
  if (!std::strcmp(name, "exp2")) return iumad::IUMAD_ISA::exp2<F>(x);
  if (!std::strcmp(name, "exp2_normal")) return iumad::IUMAD_ISA::exp2<F, Range::kNormal>(x);
  if (!std::strcmp(name, "exp2_finite")) return iumad::IUMAD_ISA::exp2<F, Range::kFinite>(x);
  if (!std::strcmp(name, "exp2_moderate")) return exp2_product_moderate<F>(broadcast(F(0.9)), x);
  if (!std::strcmp(name, "exp2_coarse_moderate")) return exp2_product_coarse<F, true>(broadcast(F(0.9)), x);
  if (!std::strcmp(name, "exp2_coarse")) return exp2_product_coarse<F, kVectorBytes != 64>(broadcast(F(0.9)), x);
  if (!std::strcmp(name, "exp2_of_square")) return exp2_product<F>(x, x);
  if (!std::strcmp(name, "log1p_unit")) return log1p_unit(x);
  if constexpr (sizeof(F) == 4)
    if (!std::strcmp(name, "log1p_unit_coarse")) return log1p_unit_coarse(x);
  if (!std::strcmp(name, "reciprocal")) return reciprocal_near_one<F>(x);
  if (!std::strcmp(name, "sigmoid")) return sigmoid<F>(x);
  if (!std::strcmp(name, "sqrt")) return iumad::IUMAD_ISA::sqrt<F>(x);
  std::fprintf(stderr, "no function %s\n", name);
  std::exit(1);
}

template <class F>
int run(const char* name) {
  F lanes[kLanes<F>];
  while (std::fread(lanes, sizeof lanes, 1, stdin) == 1) {
    store<F>(lanes, apply<F>(name, load(lanes)));
    std::fwrite(lanes, sizeof lanes, 1, stdout);
  }
  return 0;
}

int main(int, char** argument) { return std::strcmp(argument[2], "double") ? run<float>(argument[1]) : run<double>(argument[1]); }
