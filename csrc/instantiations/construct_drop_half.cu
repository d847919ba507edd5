#include "construct.cuh"

namespace attanchor {

Variants drop_half_variants() {
  static const Variant list[] = {
      variant<arch::Half, 64, 1, true>(),
      variant<arch::Half, 32, 8, true>(),
      variant<arch::Half, 64, 8, true>(),
  };
  return {list, 3};
}

}  // namespace attanchor
