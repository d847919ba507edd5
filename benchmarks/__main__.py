"""Measure what anchors cost, and make tables and plots of it: `python -m benchmarks COMMAND --help`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.rows import RESULTS, of_newest_gpu, read

IMAGES = RESULTS.parent.parent / "docs" / "images"


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} should be an integer of at least 1")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(_number(part) for part in text.split(","))
    except argparse.ArgumentTypeError:
        wish = "positive integers with commas between, such as 1,8"
        raise argparse.ArgumentTypeError(f"{text!r} should be {wish}") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _device(text: str) -> str:
    import torch

    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if text not in ("cuda", "cpu"):
        raise argparse.ArgumentTypeError(f"{text!r} should be auto, cuda or cpu; CUDA_VISIBLE_DEVICES chooses a GPU")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("there is no GPU here; use --device cpu")
    return text


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, what: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=what, description=what)

    def storing(name: str, what: str) -> argparse.ArgumentParser:
        made = command(name, what)
        made.add_argument("--output", type=Path, help=f"JSON lines (default: {RESULTS / name}.jsonl)")
        return made

    def measuring(name: str, what: str) -> argparse.ArgumentParser:
        made = storing(name, what)
        made.add_argument("--device", type=_device, default="auto", help="cuda, cpu, or auto (default: %(default)s)")
        return made

    run = measuring("roofline", "every operator and backend against a copy of the same bytes")
    run.add_argument("--shapes", type=_names, help="names, with commas; default: the four models, on a CPU 'toy'")
    run.add_argument("--batches", type=_numbers, help="default: 1,4,8,32,64, on a CPU 1,2")
    run.add_argument("--operations", type=_names, default=("forward", "backward", "merge"), help="default: all three")
    run.add_argument("--backends", type=_names, help="default: cuda and triton as far as available, on a CPU reference")
    run.add_argument("--passes", type=_names, default=("kernels", "baselines"), help="kernels, baselines, or both")
    run.add_argument("--matmuls", type=_names, help="compiled baselines' matmul: float32, bfloat16; '' for none")
    run.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16, on a CPU float32")
    run.add_argument("--repeats", type=_number, default=15, help="of each measurement (default: %(default)s)")
    run.add_argument("--budget", type=float, default=0.4, help="seconds for each measurement (default: %(default)s)")

    run = measuring("overhead", "what anchors cost in whole models: construction, prefill, cache")
    run.add_argument("--models", type=_names, help="names, with commas; default: all four")
    run.add_argument("--batches", type=_numbers, help="default: 1,8, on a CPU 1,2")
    run.add_argument("--new-tokens", type=_numbers, default=(1, 32, 128), help="default: 1,32,128")
    run.add_argument(
        "--sweep", action="store_true", help="over image tokens and inserted share instead; default output: sweep.jsonl"
    )
    run.add_argument("--real-size", action="store_true", default=None, help="real sizes on a CPU too (slow)")

    run = measuring("training", "a short LoRA training run of TinyLLaVA, plain against anchors")
    run.add_argument("--steps", type=_number, help="timed steps (default: 10, on a CPU 2)")
    run.add_argument("--batch", type=_number, help="samples a step (default: 4, on a CPU 2)")
    run.add_argument("--real-size", action="store_true", default=None, help="real sizes on a CPU too (slow)")

    run = measuring("tune", "search for faster launch configurations of the forward kernels")
    run.add_argument("--backends", type=_names, help="default: cuda and triton as far as available")
    run.add_argument("--shapes", type=_names, help="names, with commas; default: the four models, on a CPU 'toy'")
    run.add_argument("--batches", type=_numbers, default=(8, 1, 32), help="default: 8,1,32")
    run.add_argument("--limit", type=float, default=500, help="seconds for everything (default: %(default)s)")

    run = storing("cpu-reference", "the reference on a CPU against its unavoidable work and a literal loop")
    run.add_argument("--rounds", type=_number, default=15, help="interleaved measurements (default: %(default)s)")
    run.add_argument("--toy", action="store_true", help="a small shape, to see that the command runs")

    run = command("store-demo", "store what `make demo` wrote, for the README")
    run.add_argument("demo", type=Path, help="folder that `make demo` wrote")
    run.add_argument("--images", type=Path, default=IMAGES, help="folder of the README's pictures")

    run = command("compare", "two sets of rows; exit status 1 if anything became slower, 2 if nothing can be compared")
    run.add_argument("before", type=Path, help="a .jsonl file, or a folder of them")
    run.add_argument("after", type=Path)
    run.add_argument("--threshold", type=float, default=5.0, help="percent slower that fails (default: %(default)s)")

    run = command("targets", "every target: met, missed by how much, or not measured")
    run.add_argument("--results", type=Path, default=RESULTS, help="folder of rows (default: %(default)s)")

    run = command("report", "write the README's tables and plots from the stored rows")
    run.add_argument("--results", type=Path, default=RESULTS, help="folder of rows (default: %(default)s)")
    run.add_argument("--readme", type=Path, default=RESULTS.parent.parent / "README.md", help="default: %(default)s")
    run.add_argument("--images", type=Path, default=IMAGES, help="default: %(default)s")
    run.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the README is not current")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = parser().parse_args(arguments)
    if "output" in options:
        name = "sweep" if getattr(options, "sweep", False) else options.command
        options.output = options.output or RESULTS / f"{name}.jsonl"
        if getattr(options, "device", "cpu") == "cpu" and of_newest_gpu(read(options.output)):
            print(f"{options.output} holds rows of a GPU; name another file by --output", file=sys.stderr)
            return 2
    # Imported when needed: compare, targets and report want no model code.
    if options.command == "roofline":
        return _roofline(options)
    if options.command == "overhead":
        from benchmarks import overhead

        return overhead.main(options)
    if options.command == "training":
        from benchmarks import training

        return training.main(options)
    if options.command == "tune":
        from benchmarks import tune

        return tune.main(options)
    if options.command == "cpu-reference":
        from benchmarks import cpu_reference

        return cpu_reference.main(options)
    if options.command == "store-demo":
        from benchmarks import demonstration

        return demonstration.main(options)
    from benchmarks import compare, report, targets

    judging = {"compare": compare.main, "targets": targets.main, "report": report.main}
    try:
        return judging[options.command](options)
    except ValueError as error:  # rows that are none
        print(error, file=sys.stderr)
        return 2


def _roofline(options: argparse.Namespace) -> int:
    import torch

    from attanchor_kernels import backends
    from benchmarks import baselines, cases, roofline

    on_cpu = options.device == "cpu"
    names = options.shapes or (("toy",) if on_cpu else tuple(shape.name for shape in cases.SHAPES))
    allowed = {
        "shapes": (names, cases.SHAPE_OF),
        "operations": (options.operations, cases.OPERATIONS),
        "passes": (options.passes, roofline.PASSES),
        "matmuls": (options.matmuls or (), baselines.MATMUL_DTYPES),
        "backends": (options.backends or (), ("reference", "triton", "cuda")),
    }
    for option, (given, known) in allowed.items():
        if unknown := [name for name in given if name not in known]:
            print(f"--{option} is {', '.join(unknown)}; it should be of {', '.join(known)}", file=sys.stderr)
            return 2
    for name in options.backends or ():
        if reason := backends.why_not(name, options.device):
            print(f"--backends is {name}, which cannot run here: {reason}", file=sys.stderr)
            return 2
    # The sizes that the targets are about come first, so that a run cut short has them.
    batches = options.batches or ((1, 2) if on_cpu else (8, 1, 32, 64, 4))
    dtype = getattr(torch, options.dtype or ("float32" if on_cpu else "bfloat16"))
    matmuls = options.matmuls if options.matmuls is not None else (() if on_cpu else baselines.MATMUL_DTYPES)
    settings = roofline.Settings(
        options.device,
        options.output,
        options.backends or roofline.kernel_backends(torch.device(options.device)),
        options.passes,
        matmuls,
        options.repeats,
        options.budget,
    )
    chosen = [
        cases.Case(operation, cases.SHAPE_OF[name], batch, dtype)
        for batch in batches
        for name in names
        for operation in options.operations
    ]
    try:
        roofline.run_cases(chosen, settings)
    except cases.WrongResult as error:
        print(f"wrong or missing: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
