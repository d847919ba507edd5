"""From cosines to figures, and from figures to a verdict with its reasons."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attanchor_vlm.analysis.probe_scores import CONTENT, KINDS, PromptScores

# The paper's sweep (0.08 to 0.16) with what lies around it, for models of other widths.
TAUS = (0.04, 0.06, 0.07, 0.08, 0.1, 0.12, 0.14, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

# The paper chooses tau so that about a tenth of the text tokens are inserted.
WANTED_SHARE = 0.1
# The lowest tau of the paper (Qwen2.5-VL, 0.07 to 0.08): if a tenth of the tokens does not reach it, the best cosines
# are uniformly low, the first of its failure conditions.
LOWEST_TAU = 0.07
# Half of what is called a small effect (Cohen's d of 0.2). Half, because many content words of a question ("picture",
# "colour") fit every image alike and thin the effect out. Measured on the small LLaVA: 0.35, and between -0.1 and 0.11
# with its projector's output permuted, in eight ways.
LEAST_EFFECT = 0.1
# Below this the bootstrap's intervals are too narrow, and one odd image decides: no verdict.
LEAST_IMAGES = 30
# If half of all words have the same image token for host, the place of a copy says next to nothing about the word.
HUB_SHARE = 0.5

FOLLOWS = "matching follows content"
WEAK = "matching is weak"
DOES_NOT_FOLLOW = "matching does not follow the image"
UNDECIDED = "not enough samples to tell"


@dataclass(frozen=True)
class KindScores:
    """Best cosines of the tokens of one kind. `random` is the mean cosine of a token and a random image token of its
    sample, `margin` the mean of best minus that; NaN (None in JSON) without tokens."""

    tokens: int
    mean: float
    quantiles: tuple[float, ...]
    random: float
    margin: float


@dataclass(frozen=True)
class Share:
    """Text tokens that tau inserts, over those that take part: of all, and of each kind."""

    tau: float
    all: float
    content: float
    function: float
    punctuation: float


@dataclass(frozen=True)
class Shuffled:
    """Best cosines with the own image less those with another sample's, of content words.

    Attributes:
        own, other: Their means.
        drop: Mean of the paired differences, first within each image, then over images.
        low, high: Its 95 % interval, by bootstrap over images.
        effect: `drop` over the standard deviation that the best cosine of a token has from image to image.
        wins: Share of pairs in which the own image scores higher; 0.5 by chance.
        control: The lowest and the highest drop with the projector's output features permuted, in `CONTROLS` ways.
        function_drop: The drop of all other tokens, for comparison.
    """

    own: float
    other: float
    drop: float
    low: float
    high: float
    effect: float
    wins: float
    control: tuple[float, float]
    function_drop: float


@dataclass(frozen=True)
class Hosts:
    """Where words go, in the mean over images.

    Attributes:
        words: Content tokens that were looked up in every image.
        patches: Image tokens of a sample that can host.
        distinct: How many of them are the best match of a word.
        top_share: Share of the words whose best match is the most popular one of them.
        effective: Inverse of the probability that two words have the same host.
    """

    words: int
    patches: float
    distinct: float
    top_share: float
    effective: float


@dataclass(frozen=True)
class Reason:
    """One check: what was measured, and whether it speaks for anchors."""

    name: str
    passed: bool
    text: str


@dataclass(frozen=True)
class Probe:
    """What the probe measured; `to_dict` is its JSON.

    Attributes:
        samples, images: What it was measured on.
        kinds: Best cosines by kind of token.
        control_best: Mean best cosine of content tokens with the projector's output features permuted: the lowest and
            the highest of `CONTROLS` permutations. What chance gives in this many dimensions.
        shares: Inserted share at each tau.
        tau: Inserts `WANTED_SHARE`.
        content_at_tau, content: Share of content tokens among those that `tau` inserts, and among all.
        verdict: One of `FOLLOWS`, `WEAK`, `DOES_NOT_FOLLOW`, `UNDECIDED`.
    """

    samples: int
    images: int
    kinds: dict[str, KindScores]
    control_best: tuple[float, float]
    shares: tuple[Share, ...]
    tau: float
    content_at_tau: float
    content: float
    shuffled: Shuffled
    hosts: Hosts
    verdict: str
    reasons: tuple[Reason, ...]

    def to_dict(self) -> dict[str, object]:
        """As JSON has it: NaN becomes None."""
        return json.loads(json.dumps(dataclasses.asdict(self)), parse_constant=lambda _: None)


def measure(prompts: Sequence[PromptScores], taus: Sequence[float] = TAUS, seed: int = 0) -> Probe:
    """The figures and the verdict of a set of scored prompts.

    Args:
        taus: Thresholds that the inserted share is given for.
        seed: Of the bootstrap.

    Raises:
        ValueError: no prompt has a content word.
    """
    best, mean, kinds = (np.concatenate([getattr(p, name) for p in prompts]) for name in ("best", "mean", "kinds"))
    if not (kinds == CONTENT).any():
        raise ValueError("no question has a content word, so there is nothing whose matching could follow an image")
    control = np.mean(np.concatenate([p.control for p in prompts], axis=1), axis=1)
    tau = float(np.quantile(best, 1 - WANTED_SHARE))
    inserted = best >= tau
    figures = Probe(
        samples=len(prompts),
        images=len({p.images for p in prompts}),
        kinds={kind: _of_kind(best[kinds == kind], mean[kinds == kind]) for kind in KINDS},
        control_best=(float(control.min()), float(control.max())),
        shares=tuple(_share(tau, best, kinds) for tau in sorted(taus)),
        tau=tau,
        content_at_tau=float((kinds[inserted] == CONTENT).mean()),
        content=float((kinds == CONTENT).mean()),
        shuffled=_shuffled(prompts, seed),
        hosts=_hosts(prompts),
        verdict="",
        reasons=(),
    )
    reasons = _reasons(figures)
    return dataclasses.replace(figures, verdict=_verdict(figures, reasons), reasons=reasons)


def _of_kind(best: np.ndarray, mean: np.ndarray) -> KindScores:
    if not len(best):
        nan = float("nan")
        return KindScores(0, nan, (nan,) * len(QUANTILES), nan, nan)
    quantiles = tuple(float(q) for q in np.quantile(best, QUANTILES))
    return KindScores(len(best), float(best.mean()), quantiles, float(mean.mean()), float((best - mean).mean()))


def _share(tau: float, best: np.ndarray, kinds: np.ndarray) -> Share:
    reached = best >= tau
    by_kind = {kind: float(reached[kinds == kind].mean()) if (kinds == kind).any() else 0.0 for kind in KINDS}
    return Share(tau, float(reached.mean()), **by_kind)


def _shuffled(prompts: Sequence[PromptScores], seed: int) -> Shuffled:
    drops: dict[tuple, list[np.ndarray]] = {}  # by image: (1 + controls,) means of one prompt each
    own, other, wins, variances, function = [], [], [], [], []
    for prompt in prompts:
        content = prompt.kinds == CONTENT
        if not len(prompt.elsewhere):
            continue
        function += (prompt.best - prompt.elsewhere)[:, ~content].ravel().tolist()
        if not content.any():
            continue
        here, there = prompt.best[content], prompt.elsewhere[:, content]
        control = (prompt.control[:, None] - prompt.control_elsewhere).mean((1, 2))
        drops.setdefault(prompt.images, []).append(np.array([(here - there).mean(), *control]))
        own += here.tolist()
        other += there.ravel().tolist()
        wins += ((here > there) + 0.5 * (here == there)).ravel().tolist()
        if len(there) > 1:
            variances += there.var(0, ddof=1).tolist()
    of_images = np.stack([np.mean(parts, axis=0) for parts in drops.values()])
    drop, *control = of_images.mean(0).tolist()
    draw = np.random.default_rng(seed).integers(len(of_images), size=(2000, len(of_images)))
    low, high = np.quantile(of_images[:, 0][draw].mean(1), (0.025, 0.975)).tolist()
    # From image to image where there are several others; with two images alone, over all tokens.
    spread = float(np.sqrt(np.mean(variances))) if variances else float(np.std(other))
    return Shuffled(
        own=float(np.mean(own)),
        other=float(np.mean(other)),
        drop=drop,
        low=low,
        high=high,
        effect=drop / spread if spread > 0 else 0.0,
        wins=float(np.mean(wins)),
        control=(min(control), max(control)),
        function_drop=float(np.mean(function)) if function else float("nan"),
    )


def _hosts(prompts: Sequence[PromptScores]) -> Hosts:
    counts = [np.bincount(prompt.hosts, minlength=prompt.patches) for prompt in prompts]
    words = len(prompts[0].hosts)
    shares = [count / words for count in counts]
    return Hosts(
        words=words,
        patches=float(np.mean([prompt.patches for prompt in prompts])),
        distinct=float(np.mean([(count > 0).sum() for count in counts])),
        top_share=float(np.mean([share.max() for share in shares])),
        effective=float(np.mean([1 / (share**2).sum() for share in shares])),
    )


def _reasons(probe: Probe) -> tuple[Reason, ...]:
    shuffled, content = probe.shuffled, probe.kinds[CONTENT]
    follows = shuffled.low > 0 and shuffled.drop > shuffled.control[1]
    drop = (
        f"with another sample's image the best cosine of content words falls by {shuffled.drop:.4f} (95 % interval "
        f"{shuffled.low:.4f} to {shuffled.high:.4f}), "
    ) + (
        f"more than with features that match nothing (at most {shuffled.control[1]:.4f})"
        if follows
        else f"no more than chance explains (features that match nothing reach {shuffled.control[1]:.4f})"
    )
    above, enough = content.mean > probe.control_best[1], probe.images >= LEAST_IMAGES
    high = probe.tau >= LOWEST_TAU
    checks = {
        "enough images": (
            enough,
            f"{probe.images} different images" + ("" if enough else f"; at least {LEAST_IMAGES} are wanted"),
        ),
        "follows the image": (follows, drop),
        "effect": (
            shuffled.effect >= LEAST_EFFECT,
            f"that is {shuffled.effect:.2f} of the spread from image to image (at least {LEAST_EFFECT} is wanted)",
        ),
        "above chance": (
            above,
            f"best cosines of content words are {content.mean:.3f} in the mean, "
            f"{'above' if above else 'no higher than'} the {probe.control_best[1]:.3f} of features that match nothing",
        ),
        "high enough": (
            high,
            f"a tenth of the tokens has a best cosine of {probe.tau:.3f} or more"
            + ("" if high else f"; uniformly low, as the paper's lowest tau is {LOWEST_TAU}"),
        ),
        "content first": (
            probe.content_at_tau >= probe.content,
            f"{probe.content_at_tau:.0%} of that tenth are content words, which are {probe.content:.0%} of all tokens",
        ),
        "no hub": (
            probe.hosts.top_share < HUB_SHARE,
            f"the most popular image token is the best match of {probe.hosts.top_share:.0%} of {probe.hosts.words} "
            "content tokens",
        ),
    }
    return tuple(Reason(name, *check) for name, check in checks.items())


def _verdict(probe: Probe, reasons: Sequence[Reason]) -> str:
    passed = {reason.name: reason.passed for reason in reasons}
    if not passed["enough images"]:
        return UNDECIDED
    if passed["follows the image"]:
        return FOLLOWS if all(passed.values()) else WEAK
    # A large difference on few images may be chance or not; a small one would not matter if it were real.
    return UNDECIDED if passed["effect"] else DOES_NOT_FOLLOW


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
