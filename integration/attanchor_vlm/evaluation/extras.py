"""Optional packages: one line that names what to install, before any work starts."""

from __future__ import annotations

import functools
import importlib
import shutil
import subprocess
from types import ModuleType

EXTRA = 'pip install "attanchor-kernels[eval]"'


class MissingExtraError(ValueError):
    """A metric needs a package, or a program, that is not installed."""


def require(module: str, package: str, for_what: str) -> ModuleType:
    """Import `module`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or package
        if missing.partition(".")[0] == module.partition(".")[0]:
            raise MissingExtraError(f"{for_what} needs {package}, which is not installed: {EXTRA}") from error
        raise MissingExtraError(f"{for_what} needs {package}, which cannot be imported ({error}): {EXTRA}") from error


def require_java(for_what: str) -> None:
    """Raises: MissingExtraError: there is no java on the path, or one that does not run."""
    java = shutil.which("java")
    if java is not None and not _runs(java):
        raise MissingExtraError(f"{for_what} needs java, and {java} does not run: install a Java runtime")
    if java is None:
        raise MissingExtraError(
            f"{for_what} needs java, and there is none on the path: install a Java runtime (such as "
            f"default-jre-headless), or leave {for_what} out"
        )


@functools.cache
def _runs(java: str) -> bool:
    """macOS has a java that only says where to get one."""
    try:
        return subprocess.run([java, "-version"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False
