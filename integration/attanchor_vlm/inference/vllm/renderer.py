"""From a chat to the engine's prompt, in vLLM's place for it: the API server's process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import aiohttp
import torch
from PIL import Image
from vllm.inputs import TokensPrompt
from vllm.renderers.chat_utils import parse_chat_messages, parse_chat_messages_async
from vllm.renderers.hf import HfRenderer
from vllm.utils.async_utils import make_async
from vllm.utils.torch_utils import set_default_torch_num_threads

from attanchor_vlm.data.images import open_no_others
from attanchor_vlm.inference.vllm.counts import record
from attanchor_vlm.inference.vllm.front import Front
from attanchor_vlm.inference.vllm.model import engine_input

_STASH = "_attanchor"  # in a prompt between rendering and processing: the encoded chat
_LONGEST = 200  # as Qwen's own processor refuses; others scale the short side up, and the long one with it
_OWN = ("tokenize", "return_dict", "add_generation_prompt", "continue_final_message")


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """A forbidden file, an address without an image and too many pixels are the client's mistakes, not the server's."""
    try:
        yield
    except (RuntimeError, OSError, aiohttp.ClientError, Image.DecompressionBombError) as error:
        raise ValueError(str(error) or f"an image could not be fetched ({type(error).__name__})") from error


class AnchorRenderer(HfRenderer):
    """Chats are encoded as for `generate`, by the same function: the same ids, and the user's words known."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        open_no_others()  # vLLM decodes a request's images before they come here
        self._front: Front | None = None
        self._loading = threading.Lock()
        # On the one thread for images: neither tokenizer nor model is for several at a time.
        self._encode_async = make_async(self._encode, executor=self._mm_executor)
        self._insert_async = make_async(self._insert, executor=self._mm_executor)

    @property
    def front(self) -> Front:
        """Loaded when it is first asked for: not before the engine's process has been started, which may be a fork."""
        with self._loading:
            if self._front is None:
                config = self.model_config
                device = "cuda" if torch.cuda.is_available() else "cpu"
                self._front = Front(config.model, config.hf_config, config.dtype, device)
            return self._front

    def warmup_mm(self) -> None:
        self.front  # noqa: B018  # at start-up, so that what is wrong with it is said there
        self._mm_warmup_done = True

    def render_messages(self, messages: list[Any], params: Any) -> tuple[list[Any], Any]:
        with _refusals():
            conversation, data, _ = parse_chat_messages(messages, self.model_config, "openai", params.media_io_kwargs)
        return conversation, self._encode(conversation, data, params)

    async def render_messages_async(self, messages: list[Any], params: Any) -> tuple[list[Any], Any]:
        with _refusals():
            conversation, data, _ = await parse_chat_messages_async(
                messages, self.model_config, "openai", params.media_io_kwargs
            )
        return conversation, await self._encode_async(conversation, data, params)

    def _encode(self, conversation: list[Any], data: Any, params: Any) -> Any:
        options = params.get_apply_chat_template_kwargs()
        if not options.get("add_generation_prompt", True) or options.get("continue_final_message"):
            raise ValueError("add_generation_prompt is off or continue_final_message is on; neither goes with anchors")
        if set(data or ()) - {"image"}:
            raise ValueError(f"the chat holds {', '.join(data)}; this model takes text and images")
        media = (data or {}).get("image", ())
        for width, height in (image.size for image in media):
            if max(width, height) > _LONGEST * min(width, height):
                raise ValueError(
                    f"an image has {width} x {height} pixels; no side should be {_LONGEST} times the other"
                )
        images = [getattr(image, "original_bytes", image) for image in media]
        given = {name: value for name, value in options.items() if name not in _OWN and value is not None}
        with set_default_torch_num_threads():
            encoded = self.front.encode(conversation, images, given)
        prompt: Any = TokensPrompt(prompt_token_ids=encoded["input_ids"][0].tolist())
        return {**prompt, _STASH: encoded} if images else prompt

    def _insert(self, encoded: Any) -> Any:
        with set_default_torch_num_threads():
            prompt = self.front.prompt(encoded)
            return prompt, engine_input(prompt)

    def _process_tokens(self, prompt: Any, *, skip_mm_cache: bool = False) -> Any:
        if _STASH not in prompt:
            return super()._process_tokens(prompt, skip_mm_cache=skip_mm_cache)
        return self._finished(prompt, *self._insert(prompt[_STASH]))

    async def _process_tokens_async(self, prompt: Any, *, skip_mm_cache: bool = False) -> Any:
        if _STASH not in prompt:
            return await super()._process_tokens_async(prompt, skip_mm_cache=skip_mm_cache)
        return self._finished(prompt, *await self._insert_async(prompt[_STASH]))

    @staticmethod
    def _finished(prompt: Any, made: Any, given: Any) -> Any:
        record(made.inserted, made.kept)
        return given | {name: prompt[name] for name in ("prompt", "cache_salt") if prompt.get(name)}
