#include "construct.cuh"

namespace attanchor {

Variants float_variants() {
  static const Variant list[] = {variant<float, 32, 1>(), variant<float, 32, 8>()};
  return {list, 2};
}

}  // namespace attanchor
