// Where the bindings over the emulated device allocate: garbage, in larger buffers whose rims tests look at.
#include <cstring>

#include "device.h"

// Of PyTorch's stable ABI, whose headers the bindings alone are shown.
extern "C" {
int32_t aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, void**);
int32_t aoti_torch__reinterpret_tensor(void*, int64_t, const int64_t*, const int64_t*, int64_t, void**);
int32_t aoti_torch_get_data_ptr(void*, void**);
int32_t aoti_torch_get_storage_size(void*, int64_t*);
int32_t aoti_torch_delete_tensor_object(void*);
}

extern "C" int32_t attanchor_emulated_empty(int64_t axes, const int64_t* sizes, const int64_t* strides, int32_t scalar,
                                            int32_t device, int32_t index, void** made) {
  using namespace attanchor::arch::emulator;
  if (!launches) return aoti_torch_empty_strided(axes, sizes, strides, scalar, device, index, made);
  constexpr int64_t RIM = 128;  // elements
  int64_t count = 1, bytes = 0;
  for (int64_t axis = 0; axis < axes; axis++) count *= sizes[axis];
  count += 2 * RIM;
  const int64_t one = 1;
  void *whole = nullptr, *data = nullptr;
  if (aoti_torch_empty_strided(1, &count, &one, scalar, device, index, &whole)) return 1;
  int32_t failed = aoti_torch_get_data_ptr(whole, &data) | aoti_torch_get_storage_size(whole, &bytes);
  std::memset(data, GARBAGE, bytes);
  failed |= aoti_torch__reinterpret_tensor(whole, axes, sizes, strides, RIM, made);
  return failed | aoti_torch_delete_tensor_object(whole);
}
