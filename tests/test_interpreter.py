"""What makes Triton's interpreter fast changes nothing that a kernel sees."""

import pytest

tl = pytest.importorskip("triton.language")
runtime = pytest.importorskip("triton.runtime.interpreter")


def test_what_is_remembered_is_what_triton_makes():
    """Types and tensors made a second time have the attributes that Triton gives them, and a handle of their own."""
    if not hasattr(tl.core.tensor.__init__, "__wrapped__"):
        pytest.skip("this Triton's interpreter is left as it is")
    for element in (tl.int32, tl.float32, tl.pointer_type(tl.float32)):
        for shape in ([16], [4, 8], [tl.constexpr(4), 8]):
            for made in (tl.block_type(element, shape), tl.block_type(element, shape)):
                expected = object.__new__(tl.block_type)
                tl.block_type.__init__.__wrapped__(expected, element, shape)
                assert vars(made).keys() == vars(expected).keys()
                assert (made.name, made.numel, [*made.shape]) == (expected.name, expected.numel, [*expected.shape])
                assert made.element_ty is element
                for handle in ("one", "other"):
                    held, wanted = tl.tensor(handle, made), object.__new__(tl.tensor)
                    tl.tensor.__init__.__wrapped__(wanted, handle, expected)
                    assert vars(held).keys() == vars(wanted).keys()
                    assert (held.handle, held.type, held.dtype) == (handle, made, element)
                    assert [held.numel.value, *held.shape] == [wanted.numel.value, *wanted.shape]
                assert runtime._get_np_dtype(made) == runtime._get_np_dtype.__wrapped__(expected)
