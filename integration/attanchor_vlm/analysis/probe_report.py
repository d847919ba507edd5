"""A probe in lines for the terminal."""

from __future__ import annotations

from attanchor_vlm.analysis.probe import Probe
from attanchor_vlm.analysis.probe_kinds import KINDS


def lines(probe: Probe) -> list[str]:
    """What `attanchor probe` prints: tables of figures, then the verdict with a line for each reason."""
    text = [f"{probe.samples} samples, {probe.images} different images", ""]
    text.append(f"{'best cosine of':<16}{'tokens':>8}{'mean':>8}{'5 %':>8}{'median':>8}{'95 %':>8}{'over random':>13}")
    for kind in KINDS:
        scores = probe.kinds[kind]
        if scores.tokens:
            low, _, median, _, high = scores.quantiles
            text.append(
                f"{kind:<16}{scores.tokens:>8}{scores.mean:>8.3f}{low:>8.3f}{median:>8.3f}{high:>8.3f}"
                f"{scores.margin:>13.3f}"
            )
    text += ["", f"{'tau':<16}" + "".join(f"{name:>13}" for name in ("inserted", *KINDS))]
    text += [
        f"{share.tau:<16.3g}{share.all:>13.1%}{share.content:>13.1%}{share.function:>13.1%}{share.punctuation:>13.1%}"
        for share in probe.shares
    ]
    shuffled, hosts = probe.shuffled, probe.hosts
    text += [
        "",
        f"content words with their own image {shuffled.own:.4f}, with others' {shuffled.other:.4f}; the own one scores "
        f"higher in {shuffled.wins:.0%} of pairs",
        f"hosts of {hosts.words} content tokens: {hosts.distinct:.1f} of {hosts.patches:.0f} image tokens, as good as "
        f"{hosts.effective:.1f} equally popular ones",
        "",
        f"verdict: {probe.verdict}",
    ]
    text += [f"  {'+' if reason.passed else '-'} {reason.text}" for reason in probe.reasons]
    return text
