#include "construct.cuh"

namespace attanchor {

Variants drop_bfloat_variants() {
  static const Variant list[] = {
      variant<arch::BFloat, 64, 1, true>(),
      variant<arch::BFloat, 32, 8, true>(),
      variant<arch::BFloat, 64, 8, true>(),
  };
  return {list, 3};
}

}  // namespace attanchor
