"""Conversations as users write them: checked, put into batches with their images and videos, their texts replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attanchor_vlm.chat.videos import Video

Message = Mapping[str, Any]


def placeholder_tokens(processor: Any) -> list[str]:
    """The tokens by which a processor marks images, videos and sounds: no text may hold them."""
    names = ("image_token", "video_token", "audio_token", "boi_token")
    parts = (processor, getattr(processor, "tokenizer", processor))
    found = {getattr(part, name, None) for part in parts for name in names}
    return sorted(token for token in found if isinstance(token, str) and token)


def batched(conversations: Any, *media: Any) -> tuple[Any, ...]:
    """Conversations, and of each kind of media a list for each of them, or None."""
    if not isinstance(conversations, Sequence) or isinstance(conversations, str) or not conversations:
        raise TypeError("conversations should be a list of messages, or a list of such lists, and not empty")
    single = isinstance(conversations[0], Mapping)
    found = []
    for kind, given in zip(("images", "videos"), media, strict=True):
        if single and given is not None:
            nested = isinstance(given, (list, tuple)) and len(given) == 1 and isinstance(given[0], (list, tuple))
            given = given if nested else [given]
        if given is not None:
            if not isinstance(given, Sequence) or len(given) != (1 if single else len(conversations)):
                raise ValueError(
                    f"{kind} should be a list, one entry for each of the {1 if single else len(conversations)} "
                    "conversations"
                )
            given = [list(group) if isinstance(group, (list, tuple)) else [group] for group in given]
        found.append(given)
    return [list(messages) for messages in ([conversations] if single else conversations)], *found


def checked(messages: list[Message], index: int, processor: Any) -> list[Message]:
    """The messages of a conversation, its number in the batch being `index`."""
    placeholders = placeholder_tokens(processor)
    for number, message in enumerate(messages):
        where = f"conversation {index}, message {number}"
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise ValueError(f"{where}: it should be a mapping with role and content")
        content = message["content"]
        if not isinstance(content, (str, list, tuple)):
            raise TypeError(f"{where}: content is {type(content).__name__}; it should be a string or a list of parts")
        for text in texts_of(content, where):
            if held := [token for token in placeholders if token in text]:
                raise ValueError(f'{where}: its text holds {held[0]!r}; write images as parts {{"type": "image"}}')
    if not messages:
        raise ValueError(f"conversation {index} has no messages")
    return messages


def texts_of(content: Any, where: str = "") -> list[str]:
    """The texts of a message's content, a string or parts; `where` stands in front of what is wrong with them."""
    if isinstance(content, str):
        return [content]
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or "type" not in part:
            raise ValueError(f'{where}: a part is {part!r}; it should be a mapping with "type"')
        if part["type"] == "text":
            if not isinstance(part.get("text"), str):
                raise ValueError(f'{where}: a text part should have "text", a string')
            texts.append(part["text"])
    return texts


def media_of(kind: str, batch: list[list[Message]], media: list[list[Any]] | None) -> list[list[Any]]:
    """The images or videos of each conversation, as many as its parts of that kind."""
    given = []
    for index, messages in enumerate(batch):
        parts = [
            part
            for message in messages
            if not isinstance(message["content"], str)
            for part in message["content"]
            if part["type"] == kind
        ]
        if media is not None:
            own = media[index]
        else:
            own = [part[key] for part in parts for key in (kind, "url", "path") if key in part]
        if len(own) != len(parts):
            raise ValueError(f"conversation {index} has {len(parts)} {kind} parts and {len(own)} {kind}s")
        if wrong := [one for one in own if kind == "video" and not isinstance(one, Video)]:
            raise TypeError(f"conversation {index} has a video that is {type(wrong[0]).__name__}; it should be a Video")
        given.append(own)
    return given


def with_texts(messages: Sequence[Message], change: Any) -> list[Message]:
    """The messages with every text part replaced by ``change(message number, role, text)``."""
    changed: list[Message] = []
    for number, message in enumerate(messages):
        content, role = message["content"], message["role"]
        if isinstance(content, str):
            content = change(number, role, content)
        else:
            content = [
                {**part, "text": change(number, role, part["text"])} if part["type"] == "text" else dict(part)
                for part in content
            ]
        changed.append({**message, "content": content})
    return changed
