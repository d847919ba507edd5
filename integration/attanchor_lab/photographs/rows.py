"""Rows of an experiment on photographs in the form that `attanchor report` shows: one run for each arm and seed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from attanchor_vlm.records import Row

AS_TRAINED = "as trained"  # the test without changes, on every split


def as_laboratory(plan: Mapping[str, Any], rows: Sequence[Row], name: str) -> list[Row]:
    """A row of the plan, then the runs.

    Every split of the test as trained is a test of its own, and so is the first split of every other measurement. The
    comparisons are those of the plan, on each split.

    Args:
        plan: With `question`, `contrasts` (arm, against), `margin` (a share), `splits`, `arms`, `more`, `seeds`.
        rows: With `arm`, `seed`, `test`, `values` (by split, and "split/kind"), `figures` with `losses`.
        name: What the page calls the plan.
    """
    main, *others = plan["splits"]
    contrasts = [
        {"setting": name, "arm": arm, "against": against,
         "asks": "" if number else plan["question"] if split == main else f"The same on {split} held out?",
         "margin": 100 * plan["margin"], **({} if split == main else {"test": split})}
        for split in plan["splits"] for number, (arm, against) in enumerate(plan["contrasts"])
    ]  # fmt: skip
    setting = {"name": name, "arms": list(plan["arms"]), "seeds": plan["seeds"], "more": list(plan.get("more", ()))}
    setting["more_seeds"] = plan.get("more_seeds", len(plan["seeds"]))
    first = rows[0] if rows else {}
    told = {"kind": "plan", "size": name, "settings": [setting], "contrasts": contrasts, "written": first.get("date")}
    machine = {key: first.get(key) for key in ("gpu", "processor", "torch", "transformers")}
    runs: dict[tuple[str, int], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        runs[row["arm"], row["seed"]][row["test"]] = row
    found: list[Row] = [told | machine]
    for (arm, seed), own in runs.items():
        if AS_TRAINED not in own:
            continue
        trained = own.pop(AS_TRAINED)
        tests = {split: _kinds(trained["values"], split) for split in (main, *others) if split in trained["values"]}
        for test, row in own.items():
            split = main if main in row["values"] else next(iter(row["values"]))
            tests[test] = _kinds(row["values"], split)
        losses = trained["figures"].get("losses", ())
        log = [{"step": step, "answer_loss": loss} for step, loss in enumerate(losses, start=1)]
        run = {"kind": "run", "setting": name, "arm": arm, "seed": seed, "status": "done", "test": tests}
        found.append(run | {"training": {"log": log}, "commit": trained.get("commit", "unknown")})
    return found


def _kinds(values: Mapping[str, float], split: str) -> dict[str, float]:
    kinds = {key.partition("/")[2]: value for key, value in values.items() if key.startswith(f"{split}/")}
    return {"mean": values[split], **kinds}
