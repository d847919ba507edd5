"""Tables and plots of the README and of docs/, made from the stored rows alone, so that they can be checked.

A block of a page between `<!-- generated: NAME -->` and `<!-- /generated -->` belongs to this command.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from attanchor_lab import demo_table
from attanchor_vlm.records import write_text
from benchmarks import cpu_reference, plots, same_tokens, store_demo, targets
from benchmarks.rows import IMAGES, RESULTS, ROOT, Row, latest, of_newest_gpu, ratio, read, span, table

COMMAND = "python -m benchmarks report"
LABORATORY = "docs/lab/report.md"
NAMED = "## The comparisons named before the runs"
# A pretrained language model, the main one of models trained from nothing, image tokens left out, the longest training.
README_PLANS = ("photographs", "photographs-placements", "photographs-again", "cpu", "shorter", "long")
# Of whose first comparisons the headline tells.
HELD_OUT, INHERITED, RENDERED = "photographs, concepts", "photographs-again, concepts", "cpu, main"
PAGES = ("README.md", "docs/costs.md", "docs/demo.md", "docs/serve.md", "docs/threads.md")
LARGE = 576  # image tokens of the prompts that the headline tells of
README_SIDES = ("plain", "anchors", "keep 1/3")
Block = Callable[[list[Row], str], str]  # from rows, and the path from the page to the pictures
BLOCK = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- /generated -->)", re.DOTALL)


def _hardware(rows: list[Row]) -> str:
    """Where the figures come from, one phrase; rows of several runs name all of them."""

    def said(key: str) -> str:
        return ", ".join(dict.fromkeys(str(row[key]) for row in rows))

    parts = [said("processor")]
    if rows[-1]["gpu"] != "none":
        parts = [said("gpu"), f"driver {said('driver')}", f"CUDA {said('cuda')}", f"Triton {said('triton')}"]
    return ", ".join([*parts, f"PyTorch {said('torch')}", f"commit {said('commit')}", said("date")])


def roofline_block(rows: list[Row], image: str) -> str:
    """Forward and backward as a multiple of the floor, and the plot."""
    names = list(dict.fromkeys(row["backend"] for row in rows))
    found = latest(rows, "operation", "shape", "batch", "backend")
    lines = []
    for size in sorted(dict.fromkeys(key[:3] for key in found)):
        own = [found.get((*size, name)) for name in names]
        floor = next(row["floor_us"] for row in own if row)
        cells = [f"{row['us']:.1f} us, {row['ratio']:.2f} x" if row else "" for row in own]
        lines.append([*map(str, size), f"{floor:.1f} us", *cells])
    plot = f"\n![Time over the time of a copy of the same bytes]({image}/roofline.png)\n"
    return table(["operation", "shape", "B", "floor", *names], lines) + plot


OVERHEAD = """
Length in tokens; times of the plain prompt, and beside it the median of the ratios of pairs timed by turns, with their
quartiles; "within the spread" where these lie as far apart as the median is from 1, so that no difference is shown.
Construction in brackets: its share of the plain prefill; of the plain prompt it is `masked_scatter`. Peak memory is
that of a prefill beside the weights, its cache included.
"""


def _time(us: float) -> str:
    return f"{us / 1e6:.3g} s" if us >= 1e6 else f"{us / 1e3:.3g} ms"


def overhead_block(rows: list[Row], image: str) -> str:
    """Each side of each model: length, construction, prefill, a generated token, cache, memory."""
    lines = []
    for (name, dtype, batch), found in plots.by_model(rows).items():
        anchors = found.get("anchors")
        for side, row in found.items():
            if side == "plain":
                threads = f", {row['threads']} thread{'s' * (row['threads'] > 1)}" if row["gpu"] == "none" else ""
                parts = ("construction", "prefill", "step")
                times = [_time(anchors[f"plain_{part}_us"]) if anchors else "" for part in parts]
                first = f"{name}, {dtype}, B={batch}{threads}"
            else:
                share = 100 * row["construction_us"] / row["plain_prefill_us"]
                times = [f"{_time(row['construction_us'])} ({share:.2g} %)", ratio(row, "prefill"), ratio(row, "step")]
                first = ""
            cache = f"{row['kv_bytes'] / 2**20:.1f} MiB"
            peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f} MiB"
            lines.append([first, side, str(row["length"]), *times, cache, peak])
    head = ["model", "prompt", "length", "construction", "prefill", "a generated token", "KV cache", "peak memory"]
    plot = f"\n![Prefill, a generated token and cache, of those of the plain prompt]({image}/overhead.png)\n"
    return table(head, lines) + OVERHEAD + _whole(rows) + plot


def short_overhead_block(rows: list[Row], image: str) -> str:
    """The sides that the README shows."""
    return overhead_block([row for row in rows if row["side"] in README_SIDES and row.get("measure") is None], image)


def _whole(rows: list[Row]) -> str:
    """Whole models through `attach`, where they were measured."""
    kinds = ("attached forward", "attached generate")
    size = ("model", "dtype", "batch", "side")
    forward, generated = (latest([row for row in rows if row.get("measure") == kind], *size) for kind in kinds)
    if not forward:
        return ""
    lines = [
        [f"{model}, {dtype}, B={batch}", side, ratio(row, "forward"), ratio(generated[key], "generate")]
        for key, row in forward.items()
        for model, dtype, batch, side in [key]
    ]
    return "\nWhole models through `attach`, eagerly and with their vision towers:\n\n" + table(
        ["model", "prompt", "forward", "generation"], lines
    )


def sweep_block(rows: list[Row], image: str) -> str:
    """Construction and longer prefill over image tokens and inserted text tokens, B = 1."""
    lines = [
        [
            row["model"],
            str(row["image"]),
            f"{row['inserted']} of {row['text']}",
            f"{row['plain_prefill_us'] / 1e3:.2f} ms",
            f"{100 * row['device_construction_us'] / row['plain_prefill_us']:.3f} %",
            ratio(row, "prefill"),
            f"{row['flops_ratio']:.3f} x",
        ]
        for row in latest(rows, "model", "image", "inserted").values()
    ]
    head = ["model", "image tokens", "inserted", "prefill", "construction", "longer prefill", "by FLOPs"]
    return table(head, lines)


def training_block(rows: list[Row], image: str) -> str:
    """Time of a step and memory, plain against anchors."""
    lines = [
        [
            f"{row['model']}, {row['dtype']}, B={row['batch']}",
            _time(row["plain_train_step_us"]),
            ratio(row, "train_step"),
            f"{row['plain_peak_bytes'] / 2**30:.2f} and {row['peak_bytes'] / 2**30:.2f} GiB",
        ]
        for row in latest(rows, "model", "dtype", "batch").values()
    ]
    return table(["", "a step", "with anchors", "peak memory"], lines)


def serve_block(rows: list[Row], image: str) -> str:
    """Requests a second of three servers, and the memory that many of them leave behind."""
    measured = [row for row in rows if "rounds" in row]
    lines = [
        [
            row["side"],
            str(row["clients"]),
            f"{row['length']}, plain {row['plain_length']}",
            str(row["rounds"]),
            f"{row['per_second']:.3g}, plain {row['plain_per_second']:.3g}",
            ratio(row, "requests"),
        ]
        for row in measured
    ]
    loads = [load for row in measured for load in row["load"]]
    load = f"\nThe load average was {span(str(min(loads)), str(max(loads)))}, on {measured[0]['cores']} cores.\n"
    memory = "".join(
        "\nResident memory of the processes of the server with anchors after "
        + ", ".join(f"{done} requests {size / 1e6:.0f} MB" for done, size in row["resident_bytes"].items())
        + ".\n"
        for row in rows
        if row.get("measure") == "memory"
    )
    head = ["", "clients", "tokens of a prompt", "rounds", "requests a second", "over the plain model's"]
    return table(head, lines) + load + memory


def demo_block(rows: list[Row], image: str) -> str:
    """The demonstration's table, verdict and pictures."""
    (row,) = rows
    found = table(demo_table.HEAD, demo_table.lines_of(row))
    explained = demo_table.EXPLAINED.format(**row) + "\n\n" + "\n".join(f"- {line}" for line in row["verdict"])
    pictures = "\n".join(
        f"![{what}]({image}/demo-{name})"
        for what, name in (
            ("Anchors at their patches in rendered scenes", "scenes.png"),
            ("Anchors on photographs", "photographs.png"),
            ("Loss and inserted share", "loss.png"),
        )
    )
    return f"{found}\n{explained}\n\n{pictures}\n"


def audit_block(rows: list[Row], image: str) -> str:
    """What attacks of each kind tried, and how many of them found something."""
    lines = [
        [row["kind"], f"{row['tried']:,}", str(row["failed"])] for row in sorted(rows, key=lambda row: row["kind"])
    ]
    return table(["attack", "tried", "failed"], lines)


def targets_block(rows: list[Row], image: str) -> str:
    """The targets of which something is measured or predicted, counted; the whole table is the command's."""
    verdicts = targets.judge(rows)
    known = {one.target for one in verdicts if one.value is not None or one.predicted is not None}
    if not known:
        return ""
    made = f"\nEvery target at every size: `python -m benchmarks targets`. Written by `{COMMAND}`.\n"
    return targets.summary([one for one in verdicts if one.target in known]) + made


def laboratory_block(rows: list[Row], image: str) -> str:
    """From the laboratory's page, the table of the comparisons named before the runs: of `README_PLANS`, the lines with
    a question of their own.

    `attanchor report` writes that page from the laboratory's own rows.
    """
    head, *lines = _named_comparisons()
    shown = [line for line in lines if line[0].split(",")[0] in README_PLANS and line[1]]
    how = "Points of mean accuracy, paired by seed; interval, p and verdict are of one test, corrected for its plan."
    link = f"From the rows under `docs/lab`, by `attanchor report`; all plans: [the report]({LABORATORY})."
    return f"{table(head, shown)}\n{how} {link}\n"


def _named_comparisons() -> list[list[str]]:
    """The laboratory's table of the comparisons named before the runs, head first, each line in cells."""
    page = (ROOT / LABORATORY).read_text(encoding="utf-8")
    section = page.partition(f"{NAMED}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    if len(lines) < 3:
        raise ValueError(f"{LABORATORY} has no table under {NAMED!r}")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("| ---")]


def headline_block(rows: list[Row], image: str) -> str:
    """What was measured, in two lines: a shorter prompt's cost, and what the laboratory's main comparisons found."""
    said = []
    models = plots.by_model(plots.overhead_rows(rows))
    shorter = {
        key: sides
        for key, sides in models.items()
        if {"plain", "keep 1/3"} <= sides.keys() and sides["plain"]["image"] >= LARGE
    }
    if shorter:
        ratios = [sides["keep 1/3"]["prefill_ratio"] for sides in shorter.values()]
        prefill = span(f"{min(ratios):.2f}", f"{max(ratios):.2f}")
        caches = sorted(sides["keep 1/3"]["kv_bytes"] / sides["plain"]["kv_bytes"] for sides in shorter.values())
        *names, last = dict.fromkeys(name for name, *_ in shorter)
        named = f"{', '.join(names)} and {last}" if names else last
        device = next(iter(shorter.values()))["keep 1/3"]["gpu"]
        said.append(
            f"- Anchors with **a third of the image tokens**: a prefill takes {prefill} of the plain prompt's "
            f"time, the KV cache {caches[0]:.2f} of its size ({named}, random weights, "
            f"{'a CPU' if device == 'none' else device}; [what it costs](#what-it-costs))."
        )
    head, *lines = _named_comparisons()
    first = {line[0]: dict(zip(head, line, strict=True)) for line in reversed(lines)}
    photographs, inherited, rendered = (
        f"{line['difference, points']} points of accuracy ({line['compared']}; 95 % interval {line['95 % interval']}, "
        f"{line['seeds']} seeds: {line['verdict']})"
        for line in (first[HELD_OUT], first[INHERITED], first[RENDERED])
    )
    said.append(
        "- Do anchors as published (sequential positions) help? In a small model with a pretrained language model, on "
        f"photographs of things held out of its training, {photographs}; where copies take the position of their "
        f"patch, {inherited}. In small models trained from nothing on rendered scenes {rendered}; at random patches "
        "next to nothing, and after a long training no difference is shown ([does it help?](#does-it-help))."
    )
    return "\n".join(said) + "\n"


def _of(run: str, rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.get("run") == run]


def _on_gpu(run: str, rows: list[Row]) -> list[Row]:
    return _of(run, of_newest_gpu(rows))


def _served(rows: list[Row]) -> list[Row]:
    """Of servers; nothing where only memory was measured, or requests to one engine, as in rows of before."""
    found = [row for row in _of("serve", rows) if "rounds" in row or "measure" in row]
    return found if any("rounds" in row for row in found) else []


def _trained(rows: list[Row]) -> list[Row]:
    """On the newest GPU, or on a CPU where none trained."""
    return _on_gpu("training", rows) or _of("training", rows)


def _block(choose: Callable[[list[Row]], list[Row]], write: Block, command: str) -> Block:
    """What `write` makes of the rows that `choose` finds, and what measured them; nothing without any."""

    def made(rows: list[Row], image: str) -> str:
        chosen = choose(rows)
        if not chosen:
            return ""
        return f"{write(chosen, image)}\n{_hardware(chosen)}; measured by `{command}`, written by `{COMMAND}`.\n"

    return made


BLOCKS: dict[str, Block] = {
    "headline": headline_block,
    "roofline": _block(plots.roofline_rows, roofline_block, "python -m benchmarks roofline"),
    "overhead": _block(plots.overhead_rows, overhead_block, "python -m benchmarks overhead --real-size"),
    "short-overhead": _block(plots.overhead_rows, short_overhead_block, "python -m benchmarks overhead --real-size"),
    "sweep": _block(
        lambda rows: [row for row in _on_gpu("overhead", rows) if row.get("measure") == "sweep" and "inserted" in row],
        sweep_block,
        "python -m benchmarks overhead --sweep",
    ),
    "training": _block(_trained, training_block, "python -m benchmarks training --real-size"),
    "cpu-reference": _block(
        partial(_of, "cpu-reference"),
        lambda rows, image: table(cpu_reference.HEAD, cpu_reference.lines_of(rows)),
        "python -m benchmarks cpu-reference --threads 1,2",
    ),
    "serve": _block(_served, serve_block, "python -m benchmarks serve"),
    "same-tokens": _block(
        partial(_of, "same-tokens"),
        lambda rows, image: table(*same_tokens.table_of(rows)),
        "python -m benchmarks same-tokens",
    ),
    "targets": targets_block,
    "audit": _block(lambda rows: list(latest(_of("audit", rows), "kind").values()), audit_block, "make audit"),
    "demo": _block(lambda rows: _of("demo", rows)[-1:], demo_block, f"make demo` and `{store_demo.MAKE}"),
    "laboratory": laboratory_block,
}


def render(page: str, rows: list[Row], image: str) -> str:
    """A page with its generated blocks made anew. `image` is the path from the page to the plots.

    Raises:
        ValueError: a block has a name that is none of BLOCKS, or has no end.
    """
    for opened in re.findall(r"<!-- generated: ([\w-]+) -->", page):
        if opened not in BLOCKS:
            raise ValueError(f"the page has a generated block {opened!r}; known are {', '.join(BLOCKS)}")
    if page.count("<!-- generated: ") != len(BLOCK.findall(page)):
        raise ValueError("a generated block has no <!-- /generated --> after it")
    return BLOCK.sub(lambda found: found[1] + BLOCKS[found["name"]](rows, image) + found[4], page)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of rows (default: %(default)s)")
    pages: list[Path] = [ROOT / page for page in PAGES]
    parser.add_argument("--pages", type=Path, nargs="+", default=pages, help=f"default: {', '.join(PAGES)}")
    parser.add_argument("--images", type=Path, default=IMAGES, help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if not current")


def main(options: argparse.Namespace) -> int:
    """Write pages and plots; with --check only look. Returns 1 if a page is not current, 2 if one has no blocks."""
    rows = read(options.results)
    made: dict[Path, str] = {}
    for page in options.pages:
        if not page.is_file():
            print(f"{page} is no file; give pages by --pages", file=sys.stderr)
            return 2
        text = page.read_text(encoding="utf-8")
        image = os.path.relpath(options.images, page.parent).replace(os.sep, "/")
        try:
            made[page] = render(text, rows, image)
        except ValueError as error:
            print(f"{page}: {error}", file=sys.stderr)
            return 2
        if not BLOCK.search(text):
            print(f"{page} has no block <!-- generated: NAME -->, NAME of {', '.join(BLOCKS)}", file=sys.stderr)
            return 2
    wanted = plots.wanted(rows)
    stale = [page for page, text in made.items() if page.read_text(encoding="utf-8") != text]
    if options.check:
        if not stale and all(plots.is_current(plot, options.images / name) for name, plot in wanted.items()):
            return 0
        named = ", ".join(map(str, stale)) or "a plot"
        print(f"not current: {named}; run `{COMMAND}`", file=sys.stderr)
        return 1
    for name, plot in wanted.items():
        plots.save(plot, options.images / name)
    for page in stale:
        write_text(page, made[page])
    return 0
