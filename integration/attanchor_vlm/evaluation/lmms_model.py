"""An attached model as lmms-eval takes one: chats in, greedy answers out. Needs the extra `eval`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from attanchor_vlm.data.rows import load_image
from attanchor_vlm.inference.ask import encode_questions, generated
from attanchor_vlm.model.attach import base_of
from attanchor_vlm.model.load import load

_SAMPLING = ("temperature", "top_p", "top_k")
_PASSED_ON = ("num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size")


class AttAnchorLmms(lmms):
    """The model `attanchor` of lmms-eval.

    Anchors are the user's own words, found through the chat template; special tokens and role markers take no part.

    Args:
        pretrained: Folder of a saved model, or a Hub id.
        adapter: Folder of a trained adapter, which brings its own settings.
        tau: Instead of the stored threshold; 1 for no anchors, which is what a model without settings gets.
        dtype: "float32", "bfloat16", "float16", or "auto" for what the device does.
        batch_size: Prompts per `generate`.
        device: None for the GPU of this process, if there is one.
        max_new_tokens: Bound of answers whose task gives none.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        adapter: str | None = None,
        tau: float | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        device: str | None = None,
        max_new_tokens: int = 1024,
        **unknown: Any,
    ) -> None:
        unknown.pop("max_batch_size", None)  # lmms-eval gives it to every model
        if unknown:
            raise ValueError(f"model_args hold {sorted(unknown)}, which the model attanchor does not know")
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {dtype!r}; it should be auto, float32, bfloat16 or float16")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size!r}; it should be a whole number, 1 or more")
        if device is None and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        model, processor = load(
            pretrained,
            adapter,
            tau=None if tau is None else float(tau),
            dtype=None if dtype == "auto" else dtype,
            device=device,
            default_tau=1.0,
        )
        self._set_up(model, processor, int(batch_size), max_new_tokens)

    @classmethod
    def around(cls, model: Any, processor: Any, batch_size: int = 1, max_new_tokens: int = 1024) -> AttAnchorLmms:
        """The same for a model that is loaded: attached, or a PeftModel around an attached one."""
        made = cls.__new__(cls)
        made._set_up(model, processor, batch_size, max_new_tokens)
        return made

    def _set_up(self, model: Any, processor: Any, batch_size: int, max_new_tokens: int) -> None:
        super().__init__()
        self.model, self.processor = model.eval(), processor
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def config(self) -> Any:
        return base_of(self.model).config

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One answer for each request, in order; requests with the same generation settings share batches."""
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), []).append(index)
        with tqdm(total=len(requests), desc="answering", unit="prompt", disable=self.rank != 0) as bar:
            for indices in groups.values():
                settings = requests[indices[0]].args[2]
                for start in range(0, len(indices), self.batch_size):
                    part = indices[start : start + self.batch_size]
                    for index, text in zip(part, self._answer([requests[i] for i in part], settings), strict=True):
                        answers[index] = text
                        self.cache_hook.add_partial("generate_until", (requests[index].args[0], settings), text)
                    bar.update(len(part))
        return answers

    def _answer(self, requests: Sequence[Any], settings: Mapping[str, Any]) -> list[str]:
        chats, images = [], []
        for request in requests:
            _, to_messages, _, doc_id, task, split = request.args
            chat, seen = as_chat(ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id])), task)
            chats.append(chat)
            images.append(seen)
        batch = encode_questions(self.model, self.processor, chats, images)
        texts = generated(self.model, self.processor, batch, **generation_options(settings, self.max_new_tokens))
        return [cut(text, settings.get("until")).strip() for text in texts]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered: lmms-eval asks chat models for answers alone."""
        raise NotImplementedError("the model attanchor generates answers; it has no likelihoods to compare")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("the model attanchor answers one turn; tasks of several rounds are not offered")


def as_chat(messages: Any, task: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """A conversation (lmms-eval's ChatMessages) as `encode_chat` takes it, and its images in order."""
    chat: list[dict[str, Any]] = []
    images: list[Any] = []
    for one in messages.messages:
        content: list[dict[str, str]] = []
        for part in one.content:
            if part.type == "text":
                content.append({"type": "text", "text": part.text})
            elif part.type == "image":
                image = part.url
                images.append(load_image(Path(image) if isinstance(image, str) else image))
                content.append({"type": "image"})
            else:
                raise ValueError(f"task {task} has {part.type}; anchors are inserted in images only")
        chat.append({"role": one.role, "content": content})
    return chat, images


def generation_options(settings: Mapping[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """Arguments of `generate` from a task's `generation_kwargs`; greedy unless they ask for sampling."""
    options: dict[str, Any] = {"max_new_tokens": int(settings.get("max_new_tokens") or max_new_tokens)}
    options |= {name: settings[name] for name in _PASSED_ON if settings.get(name) is not None}
    temperature = settings.get("temperature") or 0
    options["do_sample"] = bool(settings.get("do_sample", temperature > 0)) and temperature > 0
    if options["do_sample"]:
        options |= {name: settings[name] for name in _SAMPLING if settings.get(name) is not None}
    return options


def cut(text: str, until: Iterable[str] | str | None) -> str:
    """`text` up to the first of the stop strings."""
    for stop in [until] if isinstance(until, str) else until or ():
        if stop:
            text = text.partition(stop)[0]
    return text
