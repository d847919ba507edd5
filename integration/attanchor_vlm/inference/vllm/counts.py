"""Response headers that say what became of a request's prompt: vLLM leaves a plugin no place in the body."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from typing import Any

_counts: ContextVar[dict[str, int] | None] = ContextVar("attanchor_counts", default=None)


def record(inserted: int, kept: int) -> None:
    """Note the anchors and the image tokens of a prompt of the request under way, if there is one."""
    counts = _counts.get()
    if counts is not None:
        counts["inserted"] = counts.get("inserted", 0) + inserted
        counts["kept"] = counts.get("kept", 0) + kept


class CountHeaders:
    """ASGI middleware: ``x-attanchor-inserted`` and ``x-attanchor-kept`` in answers to chats with images."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Callable[..., Any]) -> None:
        counts: dict[str, int] = {}
        _counts.set(counts)

        async def send_counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start" and counts:
                own = [(f"x-attanchor-{name}".encode(), str(count).encode()) for name, count in counts.items()]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        await self.app(scope, receive, send_counted)
