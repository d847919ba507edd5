"""The command that tries as many random cases as there is time for."""

import fuzz

from attanchor_kernels import reference
from benchmarks import rows


def test_cases_are_counted_and_stored(tmp_path, capsys):
    """Two runs of other seeds have a row each; the same seed again replaces its row."""
    for seed, cases in ((1, 60), (2, 7), (1, 5)):
        command = ["--backend", "reference", "--cases", str(cases), "--seed", str(seed)]
        assert fuzz.main([*command, "--output", str(tmp_path / "fuzz.jsonl")]) == 0
    found = {row["seed"]: row for row in rows.read(tmp_path / "fuzz.jsonl")}
    assert [found[seed]["cases"] for seed in (1, 2)] == [5, 7]
    assert not found[1]["failed"]
    assert "reference: 60 cases held, " in capsys.readouterr().out


def test_a_fault_is_found(tmp_path, monkeypatch, capsys):
    """A plan that inserts at the wrong threshold does not hold."""
    plan = reference.plan
    monkeypatch.setattr(reference, "plan", lambda problem: plan(problem._replace(tau=0.9, tau_tensor=None)))
    command = ["--backend", "reference", "--output", str(tmp_path / "fuzz.jsonl")]
    assert fuzz.main([*command, "--cases", "200"]) == 1
    (row,) = rows.read(tmp_path / "fuzz.jsonl")
    assert row["failed"]
    assert "AssertionError" in capsys.readouterr().err
