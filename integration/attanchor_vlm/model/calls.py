"""The calls of one attached model: each thread has the plan of its own last call, and no call sees `detach` midway."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from attanchor_vlm.model.plan import AnchorPlan


class Calls:
    """Kept on the model from `attach` to `detach`. Copies and pickles of a model begin without any call.

    Attributes:
        rewritten: Number of calls rewritten, in all threads.
        warned: Whether the warning about answers in a mask was given.
        check: When the model is checked: "auto", "always" or "never".
        checked: The kinds of calls, with "image" and with "video", in which the model passed. To be read and written
            while `checking` is held.
    """

    def __init__(self, check: str = "auto") -> None:
        self.check, self.checking = check, threading.Lock()
        self._running, self._closed, self._changed = 0, False, threading.Condition()
        self._forget()

    def _forget(self) -> None:
        self.rewritten, self.warned, self._own = 0, False, threading.local()
        self.checked: set[str] = set()

    def __reduce__(self) -> tuple[type[Calls], tuple[str]]:
        return Calls, (self.check,)

    @property
    def plan(self) -> AnchorPlan | None:
        """Of this thread's last call; None if that was handed through, or there was none."""
        return getattr(self._own, "plan", None)

    def record(self, plan: AnchorPlan | None) -> None:
        """Take note of this thread's call."""
        self._own.plan = plan
        if plan is not None:
            with self._changed:
                self.rewritten += 1

    def begin(self) -> bool:
        """Begin a call, which must `end`; False, and nothing to end, if the model has been detached meanwhile."""
        with self._changed:
            if not self._closed:
                self._running += 1
                self._own.depth = getattr(self._own, "depth", 0) + 1
            return not self._closed

    def end(self) -> None:
        with self._changed:
            self._running -= 1
            self._own.depth -= 1
            self._changed.notify_all()

    @contextmanager
    def none_running(self, close: bool = False) -> Iterator[None]:
        """Wait for the calls under way in other threads, and let none begin in this block; with `close`, ever after.

        The calls so far are forgotten.
        """
        if getattr(self._own, "depth", 0):
            raise RuntimeError("attach or detach inside a call of the model; it should be when the call has returned")
        with self._changed:
            self._changed.wait_for(lambda: not self._running)
            yield
            self._closed = close
            self._forget()
