#include "construct.cuh"

namespace attanchor {

Variants bfloat_variants() {
  static const Variant list[] = {
      variant<arch::BFloat, 16, 1>(), variant<arch::BFloat, 64, 1>(), variant<arch::BFloat, 32, 4>(),
      variant<arch::BFloat, 64, 4>(), variant<arch::BFloat, 32, 8>(), variant<arch::BFloat, 64, 8>(),
  };
  return {list, 6};
}

}  // namespace attanchor
