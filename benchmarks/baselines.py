"""What a user would run without these kernels: the plain definition compiled, and the merge that transformers does."""

from __future__ import annotations

import torch
from torch import Tensor

from attanchor_kernels import reference
from attanchor_kernels.cosines import NORM_FLOOR
from attanchor_kernels.problem import Problem
from attanchor_kernels.testing.inputs import TAU
from benchmarks.cases import MAX_ANCHORS, Inputs

COMPILE_MODE = "default"
MATMUL_DTYPES = ("float32", "bfloat16")


def plain_construct(image: Tensor, text: Tensor, positions: Tensor | None, matmul: str) -> tuple[Tensor, ...]:
    """`build_sequence` as a user would write it to be compiled: the reference's steps, one matmul, one gather.

    With matmul "bfloat16" the rows are multiplied as they are, on tensor cores; the norms are float32 either way.
    """
    problem = Problem(image, text, TAU, max_anchors=MAX_ANCHORS, inherit=positions is not None, position_ids=positions)
    layout = reference._lay_out_build(problem)
    score, host = _match(text, image, matmul)
    inserted = reference.select(score, TAU, MAX_ANCHORS)
    plan = reference.arrange(problem, layout, layout.real, host, inserted, score, score[:, :0])
    padding = text.new_zeros(len(text), 1, text.shape[-1])
    table = torch.cat([image, text, padding], dim=1)
    row = torch.where(plan.source < 0, table.shape[1] - 1, plan.source)
    embeds = table.gather(1, row.unsqueeze(-1).expand(-1, -1, table.shape[-1]))
    position_ids = plan.position_ids if positions is not None else plan.position_ids.squeeze(0)
    return embeds, position_ids, *plan[1:6]


def _match(movers: Tensor, hosts: Tensor, matmul: str) -> tuple[Tensor, Tensor]:
    scales = [
        torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32).clamp_min(NORM_FLOOR).reciprocal()
        for rows in (movers, hosts)
    ]
    if matmul == "float32":
        movers, hosts = movers.float(), hosts.float()
    product = torch.bmm(movers, hosts.mT).float()
    cosine = product * scales[0].unsqueeze(2) * scales[1].unsqueeze(1)
    return cosine.max(dim=-1)


class Compiled:
    """`torch.compile` of `plain_construct`: one static graph for B = 1, one with a dynamic batch for all larger.

    For one shape: the compiler forgets what it made before, or it would take the other lengths for dynamic too.
    """

    def __init__(self, matmul: str) -> None:
        torch._dynamo.reset()
        self.name = f"compile ({COMPILE_MODE}, {matmul} matmul)"

        def construct(image: Tensor, text: Tensor, positions: Tensor | None) -> tuple[Tensor, ...]:
            return plain_construct(image, text, positions, matmul)

        self._static = torch.compile(construct, fullgraph=True, dynamic=False)
        self._batched = torch.compile(construct, fullgraph=True)

    def __call__(self, inputs: Inputs) -> tuple[Tensor, ...]:
        if len(inputs.image) == 1:
            return self._static(inputs.image, inputs.text, inputs.position_ids)
        for rows in (inputs.image, inputs.text):
            torch._dynamo.maybe_mark_dynamic(rows, 0)
        if inputs.position_ids is not None:
            torch._dynamo.maybe_mark_dynamic(inputs.position_ids, 1)
        return self._batched(inputs.image, inputs.text, inputs.position_ids)


def plain_merge(inputs: Inputs) -> Tensor:
    """The embedding merge of transformers' models for a prompt without anchors: masked_scatter over the embeddings."""
    assert inputs.roles is not None
    mask = (inputs.roles == 2).unsqueeze(-1).expand_as(inputs.text)
    return inputs.text.masked_scatter(mask, inputs.image)


def verify_merge(inputs: Inputs, got: Tensor) -> bool:
    """Whether a plain merge put every feature and every text row where it belongs."""
    assert inputs.roles is not None
    is_image = inputs.roles == 2
    return torch.equal(got[is_image], inputs.image) and torch.equal(got[~is_image], inputs.text[~is_image])
