#include "construct.cuh"

namespace attanchor {

Variants half_variants() {
  static const Variant list[] = {
      variant<arch::Half, 16, 1>(), variant<arch::Half, 64, 1>(), variant<arch::Half, 32, 4>(),
      variant<arch::Half, 64, 4>(), variant<arch::Half, 32, 8>(), variant<arch::Half, 64, 8>(),
  };
  return {list, 6};
}

}  // namespace attanchor
