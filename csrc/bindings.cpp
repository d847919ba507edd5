// torch.ops.attanchor_cuda: from tensors to plain structures. PyTorch's stable ABI alone, so one binary serves PyTorch
// 2.10 and later, and Python's limited API, so it serves Python 3.10 and later.
//
// Arguments have been checked and outputs allocated by attanchor_kernels/backends/cuda, the only caller.
#include <Python.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "problem.h"

// The tests build this file over an emulated device whose tensors are on the CPU.
#ifndef ATTANCHOR_DISPATCH_KEY
#define ATTANCHOR_DISPATCH_KEY CUDA
#endif

// What the kernels are built for, with underscores between, such as 80_90+PTX: a word that no shell minds.
#ifndef ATTANCHOR_ARCHS
#define ATTANCHOR_ARCHS none
#endif
#define ATTANCHOR_TEXT(name) #name
#define ATTANCHOR_TEXT_OF(name) ATTANCHOR_TEXT(name)

namespace {

using attanchor::Copy;
using attanchor::Launched;
using attanchor::Problem;
using attanchor::Rows;
using attanchor::Scalar;
using attanchor::Tuning;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
T* data(const Optional& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}

Scalar scalar_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Scalar::float32;
    case ScalarType::Half: return Scalar::float16;
    case ScalarType::BFloat16: return Scalar::bfloat16;
    default: throw std::runtime_error("attanchor_cuda takes float16, bfloat16 and float32");
  }
}

int64_t stride_of(const Tensor& tensor, int64_t axis) {
  return tensor.stride(axis) * static_cast<int64_t>(tensor.element_size());
}

// The largest of 16, 8, 4, 2 that divides everything it is shown.
struct Width {
  uint64_t bits = 16;

  Width& with(int64_t value) {
    bits |= static_cast<uint64_t>(value);
    return *this;
  }
  Width& with(const void* pointer) { return with(static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer))); }
  Width& with(const Tensor& tensor) {
    with(tensor.mutable_data_ptr());
    for (int64_t axis = 0; axis + 1 < tensor.dim(); axis++) {
      if (tensor.size(axis) > 1) with(stride_of(tensor, axis));
    }
    return *this;
  }
  int get() const { return static_cast<int>(bits & -bits); }
};

// Image (B, M, D) or, in the merge form, (T, D); text (B, N, D) or (B, S, D). A missing one is empty.
Rows rows_of(const Tensor& image, const Tensor& text, int64_t slots, int64_t hidden) {
  const bool merges = image.dim() == 2;
  Rows rows = {};
  rows.merges = merges;
  rows.image = image.numel() > 0 ? data<uint8_t>(image) : nullptr;
  rows.text = text.numel() > 0 ? data<uint8_t>(text) : nullptr;
  rows.image_batch_stride = merges ? 0 : stride_of(image, 0);
  rows.image_row_stride = stride_of(image, merges ? 0 : 1);
  rows.text_batch_stride = stride_of(text, 0);
  rows.text_row_stride = stride_of(text, 1);
  rows.row_bytes = hidden * static_cast<int64_t>(text.element_size());
  rows.images = merges ? 0 : static_cast<int>(image.size(1));
  rows.features = static_cast<int>(merges ? image.size(0) : image.size(0) * image.size(1));
  rows.slots = static_cast<int>(slots);
  rows.nan = text.scalar_type() == ScalarType::Float  ? 0x7fc00000u
             : text.scalar_type() == ScalarType::Half ? 0x7e007e00u
                                                      : 0x7fc07fc0u;
  return rows;
}

void check(const char* error, const char* what) {
  if (error != nullptr) throw std::runtime_error(std::string("attanchor_cuda.") + what + ": " + error);
}

// Makes the tensor's device the current one until it goes out of scope.
struct OnDevice {
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  explicit OnDevice(const Tensor& tensor) {
    if (tensor.is_cuda()) guard.emplace(tensor.get_device_index());
  }
};

// How it was launched: the fields of Launched.
std::vector<int64_t> construct(Tensor image, Tensor text, Optional roles, Optional turn, Optional image_mask,
                               Optional text_mask, Optional anchor_mask, Optional position_ids, Optional keep_each,
                               Optional salience, Optional cells, Optional tau_on_device, Optional embeds,
                               Tensor new_position_ids, Tensor attention_mask, Tensor source, Tensor is_anchor,
                               Tensor host, Tensor score, Optional relevance, Tensor places, Tensor state, double tau,
                               int64_t budget, int64_t keep, bool image_into_text, bool inherit, bool pad_left,
                               int64_t tile_images, int64_t cluster, int64_t tile_rows, int64_t lag, int64_t blocks,
                               int64_t hold, int64_t bulk, int64_t stream) {
  const OnDevice on_device(text);
  const int64_t batch = text.size(0), movers = host.size(1);
  Problem p = {};
  p.rows = rows_of(image, text, places.size(2), text.size(2));
  Width width;
  width.with(image).with(text).with(p.rows.row_bytes);
  if (embeds.has_value()) width.with(embeds->mutable_data_ptr());
  p.rows.width = width.get();

  p.state.ticket = data<unsigned>(state);
  p.state.counters = p.state.ticket + attanchor::COUNTER_STRIDE;
  p.state.keys = data<unsigned long long>(state) + (1 + batch) * (attanchor::COUNTER_STRIDE / 2);
  p.state.cuts = p.state.keys + batch * movers;

  p.roles = data<const uint8_t>(roles);
  p.turn = data<const int32_t>(turn);
  p.image_mask = data<const uint8_t>(image_mask);
  p.text_mask = data<const uint8_t>(text_mask);
  p.anchor_mask = data<const uint8_t>(anchor_mask);
  p.position_ids = data<const int64_t>(position_ids);
  p.embeds = data<uint8_t>(embeds);
  p.new_position_ids = data<int64_t>(new_position_ids);
  p.attention_mask = data<int64_t>(attention_mask);
  p.source = data<int64_t>(source);
  p.is_anchor = data<uint8_t>(is_anchor);
  p.host = data<int64_t>(host);
  p.score = data<float>(score);
  p.places = data<int32_t>(places);

  p.batch = static_cast<int>(batch);
  p.texts = static_cast<int>(text.size(1));
  p.movers = static_cast<int>(movers);
  p.capacity = static_cast<int>(source.size(1));
  p.axes = static_cast<int>(new_position_ids.size(0));
  p.budget = static_cast<int>(budget < movers ? budget : movers);
  p.tau = static_cast<float>(tau);
  p.tau_on_device = data<const float>(tau_on_device);
  p.image_into_text = image_into_text;
  p.budgeted = budget < movers;
  p.inherit = inherit;
  p.pad_left = pad_left;
  p.drop.drops = relevance.has_value();
  p.drop.relevance = data<float>(relevance);
  p.drop.salience = data<const float>(salience);
  p.drop.cells = data<const int32_t>(cells);
  p.drop.keep_each = data<const int32_t>(keep_each);
  p.drop.keep = static_cast<int>(keep);
  p.drop.priority = p.state.cuts + batch;
  p.drop.survivors = p.drop.priority + batch * p.rows.slots;
  p.drop.words = p.rows.slots / 32 + 1;
  p.drop.best = p.drop.survivors + batch * p.drop.words;
  Tuning tuning;
  tuning.tile_images = static_cast<int>(tile_images);
  tuning.cluster = static_cast<int>(cluster);
  tuning.tile_rows = static_cast<int>(tile_rows);
  tuning.lag = static_cast<int>(lag);
  tuning.blocks = static_cast<int>(blocks);
  tuning.hold = static_cast<int>(hold);
  tuning.bulk = static_cast<int>(bulk);
  Launched l = {};
  check(launch_construct(p, scalar_of(text), tuning, l, reinterpret_cast<void*>(stream)), "construct");
  return {l.tile_images, l.cluster, l.holds, l.bulk, l.tile_rows, l.lag, l.blocks, l.resident, l.shared_bytes};
}

#ifdef ATTANCHOR_STAMPS
// From now on launches note their times in (blocks, items, phases) int64, which the caller keeps.
void stamp(Tensor times) {
  attanchor::stamp_rows = {data<unsigned long long>(times), static_cast<int>(times.size(0)),
                           static_cast<int>(times.size(1))};
}
#endif

// What assemble and its transpose share. A tensor of no elements stands for one that is not there.
Copy copy_of(const Tensor& image, const Tensor& text, const Tensor& places, const Tensor& sequence) {
  Copy copy = {};
  copy.rows = rows_of(image, text, places.size(2), sequence.size(2));
  copy.rows.width = Width().with(image).with(text).with(sequence).with(copy.rows.row_bytes).get();
  copy.places = data<const int32_t>(places);
  copy.sequence = data<uint8_t>(sequence);
  copy.sequence_batch_stride = stride_of(sequence, 0);
  copy.sequence_row_stride = stride_of(sequence, 1);
  copy.batch = static_cast<int>(sequence.size(0));
  copy.texts = static_cast<int>(text.size(1));
  copy.length = static_cast<int>(sequence.size(1));
  return copy;
}

void assemble(Tensor image, Tensor text, Tensor source, Tensor places, Tensor embeds, int64_t stream) {
  const OnDevice on_device(text);
  Copy copy = copy_of(image, text, places, embeds);
  copy.source = data<const int64_t>(source);
  check(launch_assemble(copy, reinterpret_cast<void*>(stream)), "assemble");
}

void assemble_backward(Tensor grad, Tensor places, Tensor image_grad, Tensor text_grad, bool need_image, bool need_text,
                       int64_t stream) {
  const OnDevice on_device(grad);
  Copy copy = copy_of(image_grad, text_grad, places, grad);
  if (!need_image) copy.rows.image = nullptr;
  if (!need_text) copy.rows.text = nullptr;
  check(launch_backward(copy, scalar_of(grad), reinterpret_cast<void*>(stream)), "assemble_backward");
}

}  // namespace

STABLE_TORCH_LIBRARY(attanchor_cuda, library) {
  library.def(
      "construct(Tensor image, Tensor text, Tensor? roles, Tensor? turn, Tensor? image_mask, Tensor? text_mask, "
      "Tensor? anchor_mask, Tensor? position_ids, Tensor? keep_each, Tensor? salience, Tensor? cells, "
      "Tensor? tau_on_device, Tensor(a!)? embeds, Tensor(b!) new_position_ids, Tensor(c!) attention_mask, "
      "Tensor(d!) source, Tensor(e!) is_anchor, Tensor(f!) host, Tensor(g!) score, Tensor(h!)? relevance, "
      "Tensor(i!) places, Tensor(j!) state, float tau, int budget, int keep, bool image_into_text, bool inherit, "
      "bool pad_left, int tile_images, int cluster, int tile_rows, int lag, int blocks, int hold, int bulk, int stream) "
      "-> int[]");
  library.def(
      "assemble(Tensor image, Tensor text, Tensor source, Tensor places, Tensor(a!) embeds, int stream) -> ()");
  library.def(
      "assemble_backward(Tensor grad, Tensor places, Tensor(a!) image_grad, Tensor(b!) text_grad, bool need_image, "
      "bool need_text, int stream) -> ()");
}

#ifdef ATTANCHOR_STAMPS
STABLE_TORCH_LIBRARY_FRAGMENT(attanchor_cuda, library) { library.def("stamp(Tensor(a!) times) -> ()"); }
#endif

STABLE_TORCH_LIBRARY_IMPL(attanchor_cuda, ATTANCHOR_DISPATCH_KEY, library) {
  library.impl("construct", TORCH_BOX(&construct));
#ifdef ATTANCHOR_STAMPS
  library.impl("stamp", TORCH_BOX(&stamp));
#endif
  library.impl("assemble", TORCH_BOX(&assemble));
  library.impl("assemble_backward", TORCH_BOX(&assemble_backward));
}

// Importing attanchor_kernels._C registers the operators. `architectures` says what the kernels were built for.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {};
  definition.m_base = PyModuleDef_HEAD_INIT;
  definition.m_name = "_C";
  definition.m_size = -1;
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  if (PyModule_AddStringConstant(module, "architectures", ATTANCHOR_TEXT_OF(ATTANCHOR_ARCHS)) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
