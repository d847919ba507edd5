"""Whatever a user or an answer says: only their own words are candidates, answers are labels without holes, and a text
that would be read as an image is refused."""

from __future__ import annotations

import pytest
from chats import KINDS, processor_of
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import examples
from tiny import IMAGE, PATCHES, picture

from attanchor_vlm import encode_chat
from attanchor_vlm.chat.words import special_token_ids

MARKERS = ["<image>", "<|im_start|>", "<|im_end|>", "</s>", "<s>", "<pad>", "USER:", "ASSISTANT:", "assistant\n"]
PIECES = st.sampled_from(
    [*MARKERS, "{{ 7 * 7 }}", "{% raw %}", " ", "\n", "\n\n", "\t", "\u200b", "\u2028", "\ufffd", "é"]
)
PIECES |= st.text(st.characters(codec="utf-8"), max_size=6) | st.sampled_from([chr(0xE000), chr(0xF8FF), "\U000f0000"])
TEXTS = st.lists(PIECES, min_size=1, max_size=6).map("".join)
PRIVATE = "".join(map(chr, range(0xE000, 0xF900)))


@pytest.mark.parametrize("kind", KINDS)
@given(question=TEXTS, answer=TEXTS)
@example(question=PRIVATE, answer="Yes.")
@example(question="Is  it ?", answer="A cat \n\n and  a dog .")
@examples(30)
def test_chats(tried, kind, question, answer):
    """Prompt injection and label masks."""
    tried()
    processor = processor_of(kind)
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    try:
        encoded = encode_chat(processor, chat, [picture()])
    except ValueError as error:
        if not any(word in str(error) for word in ("text", "answer", "turn", "message")):
            raise AssertionError("it is not said what is wrong") from error
        return
    ids, candidates, labels = encoded["input_ids"][0], encoded["anchor_mask"][0], encoded["labels"][0]
    assert int((ids == IMAGE).sum()) == PATCHES
    assert not set(ids[candidates].tolist()) & {IMAGE, *special_token_ids(processor.tokenizer)}
    supervised = (labels != -100).nonzero()[:, 0].tolist()
    assert supervised == list(range(supervised[0], supervised[-1] + 1)), "labels have a hole"
    assert not (candidates & (labels != -100)).any()
    own = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    said, expected = (processor.tokenizer.decode(part, skip_special_tokens=True) for part in (ids[labels != -100], own))
    assert "".join(expected.split()) in "".join(said.split())
