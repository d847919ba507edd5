"""Which GPUs a CUDA binary runs on, by the architectures that it was built for."""

from __future__ import annotations

import re


def runs_on(names: list[str], capability: tuple[int, int]) -> bool:
    """Whether code built for `names`, such as "80+PTX" or "90a", runs on a GPU of this compute capability.

    Machine code runs within its major version, from its minor version on; PTX on everything later too, compiled by the
    driver. Code for "a" runs on just that capability, for "f" within the major version only, PTX or not.
    """
    return any(_runs_on(name, capability) for name in names)


def _runs_on(name: str, capability: tuple[int, int]) -> bool:
    found = re.fullmatch(r"(\d+)(\d)([af]?)(\+PTX)?", name)
    if found is None:
        return False
    major, minor, kind, ptx = int(found[1]), int(found[2]), found[3], found[4]
    if kind == "a":
        return capability == (major, minor)
    if ptx and not kind:
        return capability >= (major, minor)
    return capability[0] == major and capability[1] >= minor
