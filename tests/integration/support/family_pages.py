"""What `docs/families.md` lists and the README counts, from the registry and the models of the suite: `python
family_pages.py` writes it."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from builders import FAMILIES
from table_families import TABLE, phi4_multimodal

from attanchor_vlm.model.families import adapter_for
from attanchor_vlm.model.families.base import FamilyAdapter
from attanchor_vlm.model.families.refusals import REASONS

ROOT = Path(__file__).parents[3]
PAGES = (ROOT / "docs" / "families.md", ROOT / "README.md")


@functools.cache
def generated() -> dict[str, str]:
    """The text between each pair of markers of the page."""
    rows = ["| family | routes | positions | boxes |", "|---|---|---|---|"]
    models = {family.name: family.build for family in TABLE} | {"phi4_multimodal": phi4_multimodal}
    for family, build in sorted(models.items()):
        with torch.device("meta"):
            adapter = adapter_for(build())
        boxes = "✓" if type(adapter).grids is not FamilyAdapter.grids else "—"
        rows.append(f"| `{family}` | {', '.join(adapter.routes)} | {adapter.positions} | {boxes} |")
    reasons: dict[str, list[str]] = {}
    for model_type, reason in REASONS.items():
        reasons.setdefault(reason, []).append(f"`{model_type}`")
    refused = [f"- {', '.join(sorted(names))}: {reason}" for reason, names in reasons.items()]
    return {"count": str(len(FAMILIES) + len(models)), "further": "\n".join(rows), "refused": "\n".join(refused)}


def filled(page: str) -> str:
    """A page with what is generated between its markers."""
    for name, text in generated().items():
        if name != "count" and f"<!-- {name} -->" not in page:
            continue  # the README only counts
        space = "" if name == "count" else "\n"
        before, start, rest = page.partition(f"<!-- {name} -->")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        assert start, name
        assert end, name
        page = f"{before}{start}{space}{text}{space}{end}{after}"
    return page


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
