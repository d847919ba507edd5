"""The command line. Heavy imports stand inside the commands: `--help` and mistakes in the options answer at once."""

try:
    # Each of these registers its commands, in the order in which `attanchor --help` lists them.
    from attanchor_vlm.cli import probe, training, evaluation, experiments, looking, serving, demos, lab  # noqa: F401, I001
    from attanchor_vlm.cli.entry import app, main
except ModuleNotFoundError as error:  # `pip install .` brings the operators alone
    raise SystemExit(f'error: {error}; the command line needs `pip install ".[vlm]"`') from None

__all__ = ["app", "main"]
