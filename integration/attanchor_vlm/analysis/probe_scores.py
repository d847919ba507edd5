"""The cosines that AttAnchor's matching rests on, of every prompt with its own images and with those of others.

Neither the language model nor an insertion is run: one pass of vision tower and projector for each batch. Best cosine
and host are those that the operators find (`plan.score`, `plan.host` with tau = -1).
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from attanchor_vlm.chat.words import FUNCTION_WORDS, content_spans
from attanchor_vlm.data.batches import Collator, to_model
from attanchor_vlm.data.rows import PLACEHOLDER, Sample
from attanchor_vlm.model.attach import base_of
from attanchor_vlm.model.families import adapter_for
from attanchor_vlm.model.media import encode, rows_by_sample

CONTENT, FUNCTION, PUNCTUATION = KINDS = ("content", "function", "punctuation")

PARTNERS = 4  # other images that every prompt is scored with
CONTROLS = 20  # permutations of the projector's output features: their extreme is a test at one in twenty
VOCABULARY = 256  # content tokens, the most frequent ones, whose hosts are counted in every image


@dataclass(frozen=True)
class PromptScores:
    """The N text tokens of one prompt that take part in matching, against the M image tokens of its sample.

    Attributes:
        images: The paths of the sample's images, which tell prompts about the same image.
        ids: (N,) int64 token ids.
        kinds: (N,) "content", "function" or "punctuation".
        best, host: (N,) best cosine and the index of its image token among those that can host.
        mean: (N,) mean cosine with all image tokens, which is what a random one is expected to give.
        elsewhere: (P, N) best cosine with the image tokens of other samples; NaN where there is none.
        control, control_elsewhere: (K, N'), (K, P, N'): the same for the N' content tokens with the projector's output
            features permuted, in K ways.
        hosts: (V,) host of every content token of the probe's vocabulary in this sample's images.
        patches: M.
    """

    images: tuple[Any, ...]
    ids: np.ndarray
    kinds: np.ndarray
    best: np.ndarray
    host: np.ndarray
    mean: np.ndarray
    elsewhere: np.ndarray
    control: np.ndarray
    control_elsewhere: np.ndarray
    hosts: np.ndarray
    patches: int


def choose(samples: Sequence[Sample], count: int, seed: int = 0) -> list[Sample]:
    """At most `count` samples with images, of as many different images as there are, in random order."""
    groups: dict[tuple, list[Sample]] = {}
    for sample in samples:
        if sample.images:
            groups.setdefault(sample.images, []).append(sample)
    draw = random.Random(seed)
    keys = list(groups)
    draw.shuffle(keys)
    for key in keys:
        draw.shuffle(groups[key])
    rounds = max(map(len, groups.values()), default=0)
    return [groups[key][n] for n in range(rounds) for key in keys if n < len(groups[key])][:count]


@torch.no_grad()
def prompt_scores(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    batch_size: int = 4,
    seed: int = 0,
    progress: bool = False,
    function_words: Collection[str] = FUNCTION_WORDS,
) -> Iterator[PromptScores]:
    """The scores of every sample, each scored with the images of `PARTNERS` others as well, in turn: sample i with
    those of i-1, i-2, …, so that every image is as often another's as its own.

    Args:
        model: Of a known family, attached or not, or a PeftModel; set to evaluation mode.
        processor: The model's own.
        samples: With images, of at least two different ones; `choose` puts them in a fitting order.
        function_words: Words that are no content words, in lower case.

    Raises:
        ValueError: fewer than two different images.
    """
    if len({sample.images for sample in samples}) < 2:
        raise ValueError(
            f"the {len(samples)} samples are about {len({sample.images for sample in samples})} image; the probe "
            "compares every question's own image with others, so it needs samples of two images or more"
        )
    model.eval()
    partners = min(PARTNERS, len({sample.images for sample in samples}) - 1)
    embedding = base_of(model).get_input_embeddings()
    vocabulary = _vocabulary(processor.tokenizer, samples, function_words).to(next(model.parameters()).device)
    words = _unit(embedding(vocabulary))
    generator = torch.Generator().manual_seed(seed + 2**31)  # not those of `permute_projector`
    permutations = torch.stack([torch.randperm(words.shape[1], generator=generator) for _ in range(CONTROLS)])
    permutations = permutations.to(words.device)

    # The first prompts' partners are the images at the end, so the first prompts wait for them.
    recent: deque[_Prompt] = deque(maxlen=partners)
    waiting: list[_Prompt] = []
    for start in tqdm(range(0, len(samples), batch_size), "scoring", unit="", disable=not progress, leave=False):
        for prompt in _prompts(model, processor, samples[start : start + batch_size], function_words):
            prompt.look_at_own(words, permutations)
            for other in reversed(recent):
                prompt.look_at(other)
            recent.append(prompt)
            if len(waiting) < partners:
                waiting.append(prompt)
            else:
                yield prompt.result()
    for index, prompt in enumerate(waiting):
        for other in list(recent)[::-1][: partners - index]:
            prompt.look_at(other)
        yield prompt.result()


class _Prompt:
    """One sample while it is scored: its text and its image tokens, of unit length, in float32."""

    def __init__(self, images: tuple, ids: Tensor, kinds: list[str], text: Tensor, patches: Tensor):
        self.images, self.ids, self.kinds = images, ids.cpu().numpy(), np.array(kinds, dtype=object)
        self.text, self.patches = text, patches
        self.elsewhere: list[Tensor] = []

    def look_at_own(self, words: Tensor, permutations: Tensor) -> None:
        cosines = self.text @ self.patches.T
        self.best, self.host = cosines.max(1)
        self.mean = cosines.mean(1)
        self.hosts = (words @ self.patches.T).argmax(1)
        # To permute the text's features is to permute the image's the other way, and there is less of it.
        content = self.text[torch.as_tensor(self.kinds == CONTENT, device=self.text.device)]
        self.permuted = content[:, permutations].transpose(0, 1)  # (K, N', D)
        self.control = (self.permuted @ self.patches.T).amax(-1)

    def look_at(self, other: _Prompt) -> None:
        if other.images == self.images:
            return
        both = torch.cat([self.text, self.permuted.flatten(0, 1)]) @ other.patches.T
        self.elsewhere.append(both.amax(1))

    def result(self) -> PromptScores:
        count = len(self.text)
        if self.elsewhere:
            elsewhere = torch.stack(self.elsewhere)
            control_elsewhere = elsewhere[:, count:].unflatten(1, self.control.shape).transpose(0, 1)
        else:
            elsewhere, control_elsewhere = self.text.new_zeros(0, count), self.control.new_zeros(CONTROLS, 0, 0)
        return PromptScores(
            images=self.images,
            ids=self.ids,
            kinds=self.kinds,
            best=self.best.cpu().numpy(),
            host=self.host.cpu().numpy(),
            mean=self.mean.cpu().numpy(),
            elsewhere=elsewhere[:, :count].cpu().numpy(),
            control=self.control.cpu().numpy(),
            control_elsewhere=control_elsewhere.cpu().numpy(),
            hosts=self.hosts.cpu().numpy(),
            patches=len(self.patches),
        )


def _prompts(
    model: Any, processor: Any, samples: Sequence[Sample], function_words: Collection[str]
) -> Iterator[_Prompt]:
    """What of a batch takes part in matching: the user's words, and the image tokens that are image content."""
    batch = to_model(Collator(processor, "each")(samples), model)
    arguments = {name: value for name, value in batch.items() if name not in ("anchor_mask", "labels")}
    text = base_of(model).get_input_embeddings()
    for row, (patches, sample) in enumerate(zip(image_rows(model, arguments), samples, strict=True)):
        chosen = batch["anchor_mask"][row]
        ids = batch["input_ids"][row]
        kinds = token_kinds(processor.tokenizer, ids.tolist(), chosen.tolist(), function_words)
        ids = ids[chosen]
        # In the dtype of the embeddings, as they are matched.
        embedded = text(ids)
        own = [kind for kind in kinds if kind is not None]
        yield _Prompt(sample.images, ids, own, _unit(embedded), _unit(patches.to(embedded.dtype)))


def image_rows(model: Any, arguments: dict[str, Any]) -> list[Tensor]:
    """The projected features of every sample of a batch that can host, (M, D)."""
    target = base_of(model)
    adapter = adapter_for(target)
    return rows_by_sample(target, adapter, encode(target, adapter, arguments).rows, arguments)


def _vocabulary(tokenizer: Any, samples: Sequence[Sample], function_words: Collection[str]) -> Tensor:
    """The content tokens of the users' texts, the most frequent first, at most `VOCABULARY`."""
    counts: Counter[int] = Counter()
    for sample in samples:
        for role, text in sample.messages:
            if role == "user":
                ids = tokenizer(text.replace(PLACEHOLDER, " ").strip(), add_special_tokens=False).input_ids
                kinds = token_kinds(tokenizer, ids, [True] * len(ids), function_words)
                counts.update(token for token, kind in zip(ids, kinds, strict=True) if kind == CONTENT)
    return torch.tensor([token for token, _ in counts.most_common(VOCABULARY)], dtype=torch.int64)


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows.float(), dim=-1)


def token_kinds(
    tokenizer: Any, ids: Sequence[int], chosen: Sequence[bool], function_words: Collection[str] = FUNCTION_WORDS
) -> list[str | None]:
    """The kind of every chosen token, None for the others.

    A token of several words (a metaspace tokenizer may have them) counts as content if one of them is; a token without
    a letter or digit is punctuation. Works on decoded text, of every run of chosen tokens, so that pieces of a word are
    known for what they are.
    """
    kinds: list[str | None] = []
    for is_text, run in itertools.groupby(zip(ids, chosen, strict=True), key=lambda pair: bool(pair[1])):
        own = [token for token, _ in run]
        kinds += _kinds_of_run(tokenizer, own, function_words) if is_text else [None] * len(own)
    return kinds


def _kinds_of_run(tokenizer: Any, ids: list[int], function_words: Collection[str]) -> list[str]:
    # Where every token ends in the text, from the text of ever longer beginnings: right for every tokenizer, whatever
    # it does with spaces. Half a character decodes to the replacement sign, and belongs to the token that ends it.
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    ends = [
        len(tokenizer.decode(ids[: n + 1], clean_up_tokenization_spaces=False).rstrip("�")) for n in range(len(ids))
    ]
    spans = content_spans(text, function_words)
    kinds, start = [], 0
    for end in ends:
        if any(first < end and last > start for first, last in spans):
            kinds.append(CONTENT)
        else:
            kinds.append(FUNCTION if any(character.isalnum() for character in text[start:end]) else PUNCTUATION)
        start = max(end, start)
    return kinds
