// torch.ops.attanchor_cuda: from tensors to plain structures. PyTorch's stable ABI alone, so one binary serves PyTorch
// 2.10 and later, and Python's limited API, so it serves Python 3.10 and later.
//
// Arguments have been checked by attanchor_kernels/backends/cuda, the only caller.
#include <Python.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
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

// Contiguous and not yet written, on the device of `like`.
template <size_t N>
Tensor empty(const std::array<int64_t, N>& sizes, ScalarType scalar, const Tensor& like) {
  std::array<int64_t, N> strides;
  int64_t stride = 1;
  for (size_t axis = N; axis-- > 0; stride *= std::max<int64_t>(sizes[axis], 1)) strides[axis] = stride;
  int32_t device = 0;
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(N, sizes.data(), strides.data(), static_cast<int32_t>(scalar),
                                                         device, like.get_device_index(), &made));
  return Tensor(made);
}

// The elements of a row lie side by side.
void make_rows_contiguous(Tensor& rows) {
  if (rows.size(-1) > 1 && rows.stride(-1) != 1) rows = torch::stable::contiguous(rows);
}

void make_contiguous(Optional& tensor) {
  if (tensor.has_value() && !tensor->is_contiguous()) tensor = torch::stable::contiguous(*tensor);
}

// Where the parts of the state of a launch begin, in words of 64 bits; a cache line for the ticket and the counters of
// each sample.
struct StateLayout {
  static constexpr int64_t LINE = attanchor::COUNTER_STRIDE / 2;
  int64_t keys, cuts, priority, survivors, best, words;

  // `slots` and `images` are 0 where nothing is dropped and where there are no cells.
  StateLayout(int64_t batch, int64_t movers, int64_t slots, int64_t images) {
    keys = LINE * (1 + batch);
    cuts = keys + batch * movers;
    priority = cuts + batch;
    survivors = priority + batch * slots;
    best = survivors + batch * (slots / 32 + 1);
    words = best + batch * images;
  }
};

int64_t state_words(int64_t batch, int64_t movers, int64_t slots, int64_t images) {
  return StateLayout(batch, movers, slots, images).words;
}

// From its fields in their order, or none.
Tuning tuning_of(const std::vector<int64_t>& given) {
  if (given.empty()) return {};
  const auto field = [&](size_t at) { return static_cast<int>(given.at(at)); };
  return {field(0), field(1), field(2), field(3), field(4), field(5), field(6)};
}

// The new rows unless the plan alone is wanted, the fields of Plan, and for who gives a tuning how it was launched: the
// fields of Launched, or none where there is nothing to launch.
using Constructed = std::tuple<Optional, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                               std::vector<int64_t>>;

Constructed construct(Tensor image, Tensor text, Optional roles, Optional turn, Optional image_mask, Optional text_mask,
                      Optional anchor_mask, Optional position_ids, Optional keep_each, Optional salience,
                      Optional cells, Optional tau_on_device, Tensor state, double tau, int64_t budget,
                      std::optional<int64_t> keep, int64_t capacity, bool copy, bool image_into_text, bool inherit,
                      bool pad_left, std::vector<int64_t> tuning, int64_t stream) {
  const OnDevice on_device(text);
  const bool merges = roles.has_value(), drops = keep.has_value() || keep_each.has_value();
  const int64_t batch = text.size(0), texts = text.size(1), hidden = text.size(2);
  const int64_t slots = merges ? texts : texts + image.size(1), images = merges ? slots : image.size(1);
  const int64_t movers = merges ? slots : image_into_text ? images : texts;
  const int64_t axes = position_ids.has_value() ? position_ids->size(0) : 1;

  const Scalar scalar = scalar_of(text);
  const Optional embeds =
      copy ? Optional(empty<3>({batch, capacity, hidden}, text.scalar_type(), text)) : std::nullopt;
  const Tensor new_position_ids = empty<3>({axes, batch, capacity}, ScalarType::Long, text);
  const Tensor attention_mask = empty<2>({batch, capacity}, ScalarType::Long, text);
  const Tensor source = empty<2>({batch, capacity}, ScalarType::Long, text);
  const Tensor is_anchor = empty<2>({batch, capacity}, ScalarType::Bool, text);
  const Tensor host = empty<2>({batch, movers}, ScalarType::Long, text);
  const Tensor score = empty<2>({batch, movers}, ScalarType::Float, text);
  const Tensor relevance = empty<2>({batch, drops ? images : 0}, ScalarType::Float, text);
  const Tensor places = empty<3>({batch, 3, slots}, ScalarType::Int, text);
  Constructed made(embeds, new_position_ids, attention_mask, source, is_anchor, host, score, relevance, places, {});
  if (batch == 0 || (capacity == 0 && slots == 0)) return made;

  for (Optional* each : {&roles, &turn, &image_mask, &text_mask, &anchor_mask, &position_ids, &keep_each, &salience,
                         &cells}) {
    make_contiguous(*each);
  }
  make_rows_contiguous(image);
  make_rows_contiguous(text);
  Problem p = {};
  p.rows = rows_of(image, text, slots, hidden);
  Width width;
  width.with(image).with(text).with(p.rows.row_bytes);
  if (embeds.has_value()) width.with(embeds->mutable_data_ptr());
  p.rows.width = width.get();

  const StateLayout layout(batch, movers, drops ? slots : 0, cells.has_value() ? images : 0);
  if (state.numel() < layout.words) throw std::runtime_error("attanchor_cuda.construct: the state is too small");
  p.state.ticket = data<unsigned>(state);
  p.state.counters = p.state.ticket + attanchor::COUNTER_STRIDE;
  auto* const words = data<unsigned long long>(state);
  p.state.keys = words + layout.keys;
  p.state.cuts = words + layout.cuts;

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
  p.texts = static_cast<int>(texts);
  p.movers = static_cast<int>(movers);
  p.capacity = static_cast<int>(capacity);
  p.axes = static_cast<int>(axes);
  p.budget = static_cast<int>(std::min(budget, movers));
  p.tau = static_cast<float>(tau);
  p.tau_on_device = data<const float>(tau_on_device);
  p.image_into_text = image_into_text;
  p.budgeted = budget < movers;
  p.inherit = inherit;
  p.pad_left = pad_left;
  p.drop.drops = drops;
  p.drop.relevance = data<float>(relevance);
  p.drop.salience = data<const float>(salience);
  p.drop.cells = data<const int32_t>(cells);
  p.drop.keep_each = data<const int32_t>(keep_each);
  p.drop.keep = static_cast<int>(std::min<int64_t>(keep.value_or(0), std::numeric_limits<int>::max()));
  p.drop.priority = words + layout.priority;
  p.drop.survivors = words + layout.survivors;
  p.drop.words = p.rows.slots / 32 + 1;
  p.drop.best = words + layout.best;
  Launched l = {};
  check(launch_construct(p, scalar, tuning_of(tuning), l, reinterpret_cast<void*>(stream)), "construct");
  if (!tuning.empty()) {
    std::get<std::vector<int64_t>>(made) = {l.tile_images, l.cluster, l.holds,    l.bulk,        l.tile_rows,
                                            l.lag,         l.blocks,  l.resident, l.shared_bytes};
  }
  return made;
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
  library.def("state_words(int batch, int movers, int slots, int images) -> int");
  library.def(
      "construct(Tensor image, Tensor text, Tensor? roles, Tensor? turn, Tensor? image_mask, Tensor? text_mask, "
      "Tensor? anchor_mask, Tensor? position_ids, Tensor? keep_each, Tensor? salience, Tensor? cells, "
      "Tensor? tau_on_device, Tensor(a!) state, float tau, int budget, int? keep, int capacity, bool copy, "
      "bool image_into_text, bool inherit, bool pad_left, int[] tuning, int stream) -> (Tensor? embeds, "
      "Tensor position_ids, Tensor attention_mask, Tensor source, Tensor is_anchor, Tensor host, Tensor score, "
      "Tensor relevance, Tensor places, int[] launched)");
  library.def(
      "assemble(Tensor image, Tensor text, Tensor source, Tensor places, Tensor(a!) embeds, int stream) -> ()");
  library.def(
      "assemble_backward(Tensor grad, Tensor places, Tensor(a!) image_grad, Tensor(b!) text_grad, bool need_image, "
      "bool need_text, int stream) -> ()");
}

#ifdef ATTANCHOR_STAMPS
STABLE_TORCH_LIBRARY_FRAGMENT(attanchor_cuda, library) { library.def("stamp(Tensor(a!) times) -> ()"); }
#endif

STABLE_TORCH_LIBRARY_IMPL(attanchor_cuda, CompositeExplicitAutograd, library) {
  library.impl("state_words", TORCH_BOX(&state_words));
}

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
