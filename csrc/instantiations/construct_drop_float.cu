#include "construct.cuh"

namespace attanchor {

Variants drop_float_variants() {
  static const Variant list[] = {
      variant<float, 32, 1, true>(),
      variant<float, 32, 8, true>(),
  };
  return {list, 2};
}

}  // namespace attanchor
