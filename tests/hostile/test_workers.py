"""Workers of a DataLoader, however they are started, make of a row what the process itself makes, for every family."""

from __future__ import annotations

import functools
import importlib.util
import pickle

import checkpoints
import forked
import pytest
import torch
from strategies import LONGER
from torch.utils.data import DataLoader

from attanchor_vlm.data.batches import Collator
from attanchor_vlm.data.rows import Row, samples

# Without torchvision, the processors of those with videos are classes of ours.
NAMES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision", "smolvlm"]
NAMES = [*(checkpoints.WRITERS | checkpoints.FURTHER)] if LONGER > 1 else NAMES
NAMES = [name for name in NAMES if importlib.util.find_spec(checkpoints.NEEDS.get(name, "torch")) is not None]
TURNS = (("user", "<image>\nWhat is it?"), ("assistant", "A cat."))


@pytest.fixture(scope="module")
def collators(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("workers"), {}
    for name in NAMES:
        with pytest.MonkeyPatch.context() as patch:
            made[name] = Collator(checkpoints.write(folder / name, name, patch)[1], "each")
    checkpoints.picture(0).save(folder / "a.png")
    (sample,) = samples([Row(1, TURNS, (folder / "a.png",))], "each")
    return made, sample


def collate(collators, batch):
    (name, sample) = batch[0]
    return name, collators[name]([sample])


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"] if LONGER > 1 else ["fork"])
def test_workers(tried, collators, method):
    """Processors in workers of a DataLoader, by fork, spawn and forkserver."""
    made, sample = collators
    forked.context()  # what the server of forkserver imports once
    items = [(name, sample) for name in NAMES]
    loader = DataLoader(
        items, 1, collate_fn=functools.partial(collate, made), num_workers=2, multiprocessing_context=method
    )
    with forked.time_limit():
        for name, batch in loader:
            tried()
            expected = made[name]([sample])
            assert batch.keys() == expected.keys()
            assert all(torch.equal(batch[key], expected[key]) for key in expected), name


@pytest.mark.parametrize("name", NAMES)
def test_processors(tried, collators, name):
    """Processors, pickled."""
    tried()
    processor = collators[0][name].processor
    again = pickle.loads(pickle.dumps(processor))
    assert type(again) is type(processor)
    assert again.to_dict() == processor.to_dict()
    for own in ("kept_video_settings", "chat_template"):
        assert getattr(again, own, None) == getattr(processor, own, None)
