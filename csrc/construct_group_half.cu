#include "construct_held.cuh"

namespace attanchor {

Variants group_half_variants() {
  static const Variant list[] = {
      held_variant<arch::Half, 64, 4, true>(),
      held_variant<arch::Half, 64, 8, true>(),
  };
  return {list, 2};
}

}  // namespace attanchor
