"""Processors whose tokenizers and templates differ in what makes masks and labels hard, and turns of a chat."""

from __future__ import annotations

import functools

from tiny import CHATML, VICUNA, byte_level_tokenizer, llava_processor, metaspace_tokenizer


def user(*parts: str) -> dict:
    content = [{"type": "image"} if part == "<image>" else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": content}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


@functools.cache
def processor_of(kind: str):
    tokenizer, template = {
        "bytes-chatml": (byte_level_tokenizer, CHATML),
        "bytes-vicuna": (byte_level_tokenizer, VICUNA),
        "metaspace-vicuna": (metaspace_tokenizer, VICUNA),
        "metaspace-unsplit-vicuna": (lambda: metaspace_tokenizer(split=False), VICUNA),
    }[kind]
    return llava_processor(tokenizer(), template)


KINDS = ["bytes-chatml", "bytes-vicuna", "metaspace-vicuna", "metaspace-unsplit-vicuna"]
