"""Which tokens may be copied when a call has ids alone, as from an evaluation harness. A mask that is given wins."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attanchor_vlm.chat.words import function_token_ids, special_token_ids, words_to_leave_out
from attanchor_vlm.constants import IGNORE_INDEX
from attanchor_vlm.model.config import AttAnchorConfig

# Whatever a config names so is a marker: vision_start_token_id, image_end_token_id, eoi_token_index, …
_MARKERS = ("_token_id", "_token_ids", "_token_index")


def mask_from_ids(
    model: PreTrainedModel,
    settings: AttAnchorConfig,
    input_ids: Tensor,
    is_real: Tensor,
    is_image: Tensor,
    labels: Tensor | None = None,
) -> Tensor:
    """(B, S) bool: everything after a sample's first image, less special tokens and the generation prompt, which stands
    at the end or, with `labels`, in front of the first supervised token.

    Coarser than the masks of `encode_chat`, which know the user's text: markers that are ordinary text, such as
    "ASSISTANT:" in the middle of a conversation, stay in. With `content_words`, so do function words of several tokens
    or in capitals, and the beginning of a longer word is left out if it is the token of a function word.
    """
    if settings.content_words and not settings.function_token_ids:
        raise ValueError(
            "content_words is set and the call has no anchor_mask, but function_token_ids is empty: attach with "
            "with_tokens_of(config, processor), or pass the mask of encode_chat(..., content_words=...)"
        )
    after_image = is_image.cumsum(-1) > 0
    special = sorted({*settings.special_token_ids, *settings.function_token_ids, *_named_token_ids(model)})
    is_special = torch.isin(input_ids, torch.tensor(special, dtype=input_ids.dtype, device=input_ids.device))
    mask = after_image & is_real & ~is_image & ~is_special
    if settings.generation_prompt_ids:
        prompt = is_real if labels is None else is_real & ((labels != IGNORE_INDEX).cumsum(-1) == 0)
        mask &= ~_ends_with(input_ids, prompt, settings.generation_prompt_ids)
    return mask


def frame_labels(is_video: Tensor, steps: list[int]) -> Tensor:
    """(B, S) bool: the times that stand between the frames of a video, which are no user's text. In front of the first
    frame, as many tokens as the longest one between two has.

    Args:
        is_video: (B, S) bool, the placeholders of videos.
        steps: How many frames, or steps of time, each video of the batch has.
    """
    found = torch.zeros_like(is_video)
    starts = is_video & ~torch.nn.functional.pad(is_video, (1, 0))[:, :-1]
    runs = starts.nonzero().tolist()
    if len(runs) != sum(steps) or len(runs) == len(steps):  # each video is one strip, or it is not known which is whose
        return found
    real = is_video.cpu()
    for count in steps:
        own, runs = runs[:count], runs[count:]
        (sample, first), last = own[0], own[-1][1]
        gaps = [int((~real[sample, one:other]).sum()) for (_, one), (_, other) in itertools.pairwise(own)]
        found[sample, max(0, first - max(gaps, default=0)) : last] = True
    return found & ~is_video


def with_tokens_of(config: AttAnchorConfig, processor: Any) -> AttAnchorConfig:
    """`config` with the special tokens and the generation prompt of a processor or tokenizer, for calls without masks;
    with `content_words`, also with the tokens of function words and punctuation.

    Args:
        processor: A processor or tokenizer; without a chat template there is no generation prompt to know.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    words = words_to_leave_out(config.content_words)
    return dataclasses.replace(
        config,
        special_token_ids=tuple(special_token_ids(tokenizer)),
        generation_prompt_ids=_generation_prompt(processor, tokenizer),
        function_token_ids=() if words is None else function_token_ids(tokenizer, words),
    )


def _generation_prompt(processor: Any, tokenizer: Any) -> tuple[int, ...]:
    if not (getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)):
        return ()
    question = [{"role": "user", "content": [{"type": "text", "text": "a question"}]}]
    plain, prompted = (
        processor.apply_chat_template(question, tokenize=False, add_generation_prompt=prompt)
        for prompt in (False, True)
    )
    if not prompted.startswith(plain):
        return ()
    # Tokenized where it stands: on its own, a tokenizer may put a space before it.
    whole = tokenizer(prompted, add_special_tokens=False).input_ids
    before = tokenizer(plain, add_special_tokens=False).input_ids
    both = zip(before, whole, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))
    return tuple(whole[same:])


def _named_token_ids(model: PreTrainedModel) -> Iterable[int]:
    for config in (model.config, model.config.get_text_config(), model.generation_config):
        for name, value in vars(config).items():
            if name.endswith(_MARKERS) and value is not None:
                yield from [value] if isinstance(value, int) else value


def _ends_with(input_ids: Tensor, is_prompt: Tensor, suffix: tuple[int, ...]) -> Tensor:
    """(B, S) bool: the last tokens of each sample's prompt, where they are `suffix`."""
    batch, slots = input_ids.shape
    if len(suffix) > slots:
        return torch.zeros_like(is_prompt)
    # The index of each of a prompt's last len(suffix) tokens, whichever side the padding is on.
    slot = torch.arange(slots, device=input_ids.device).expand(batch, slots)
    last = slot.masked_fill(~is_prompt, -1).topk(len(suffix), dim=-1).values.flip(-1)
    wanted = torch.tensor(suffix, dtype=input_ids.dtype, device=input_ids.device)
    matches = ((input_ids.gather(1, last.clamp(min=0)) == wanted) & (last >= 0)).all(-1, keepdim=True)
    # Where nothing matches, index 0 is written with what it holds, False.
    return torch.zeros_like(is_prompt).scatter(1, last.clamp(min=0), matches.expand_as(last))
