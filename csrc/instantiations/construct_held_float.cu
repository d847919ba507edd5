#include "construct_held.cuh"

namespace attanchor {

Variants held_float_variants() {
  static const Variant list[] = {held_variant<float, 32, 8>()};
  return {list, 1};
}

}  // namespace attanchor
