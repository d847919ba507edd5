#include "construct_held.cuh"

namespace attanchor {

Variants held_bfloat_variants() {
  static const Variant list[] = {
      held_variant<arch::BFloat, 32, 4>(),
      held_variant<arch::BFloat, 64, 4>(),
      held_variant<arch::BFloat, 32, 8>(),
      held_variant<arch::BFloat, 64, 8>(),
  };
  return {list, 4};
}

}  // namespace attanchor
