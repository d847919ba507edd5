#include "construct_held.cuh"

namespace attanchor {

Variants group_bfloat_variants() {
  static const Variant list[] = {
      held_variant<arch::BFloat, 64, 4, true>(),
      held_variant<arch::BFloat, 64, 8, true>(),
  };
  return {list, 2};
}

}  // namespace attanchor
