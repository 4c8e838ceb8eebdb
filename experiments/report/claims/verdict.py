"""From numbers to a verdict, by rule: supported, not supported, can't tell, not run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from selfdistill.experiments.report.claims.evidence import Finding, check, findings
from selfdistill.experiments.report.claims.statistics import ALPHA, MOST, POWER, Estimate, holm
from selfdistill.experiments.report.sweep import Contents
from selfdistill.experiments.spec import Claim, Contrast

Word = Literal["supported", "not supported", "can't tell", "not run"]
#: What is asked of two cells of which the same runs are an instance.
_LEVEL = ("within", "not_below")


@dataclass(frozen=True)
class Judged:
    """A comparison and what is said of it.

    Attributes:
        finding: the comparison.
        p: Holm's p-value of there being no difference; NaN without a number.
        word: the verdict.
        reason: why, in words.
        detects: the smallest difference that its design sees with 80% power, NaN if unknown.
        needs: repetitions with which it would see one that matters; None: too many, or unknown.
    """

    finding: Finding
    p: float
    word: Word
    reason: str
    detects: float
    needs: int | None


@dataclass(frozen=True)
class Verdict:
    """A claim and what is said of it.

    Attributes:
        claim: the claim.
        each: its comparisons.
    """

    claim: Claim
    each: Sequence[Judged]

    def of(self, word: Word) -> list[Judged]:
        """Comparisons of a verdict."""
        return [one for one in self.each if one.word == word]

    @property
    def word(self) -> Word:
        """One that speaks against a claim is enough; all must speak for it, some in each test."""
        if self.of("not supported"):
            return "not supported"
        if self.of("can't tell"):
            return "can't tell"
        tested = [any(one.finding.test is test for one in self.ran) for test in self.claim.tests]
        return "supported" if all(tested) else "can't tell" if any(tested) else "not run"

    @property
    def ran(self) -> list[Judged]:
        """Comparisons that have a number."""
        return [one for one in self.each if one.word != "not run"]

    @property
    def single(self) -> bool:
        """Whether all intervals are of fine-tuning alone."""
        return all(one.finding.single for one in self.ran)


def every(contents: Contents) -> list[Verdict]:
    """The verdicts of all claims, in their order."""
    claims = [contents.specs.load(Claim, name) for name in contents.specs.names(Claim)]
    return [judge(contents, one) for one in sorted(claims, key=lambda one: (one.order, one.name))]


def judge(contents: Contents, claim: Claim) -> Verdict:
    """What the sweep says of a claim."""
    check(contents, claim)
    return Verdict(claim, decide(findings(contents, claim)))


def decide(known: Sequence[Finding]) -> list[Judged]:
    """Verdicts of comparisons that belong together: Holm's correction is over all of them.

    One that is not run yet counts as one that will see nothing, so that what is said after a part
    of a sweep is not taken back for the number of comparisons when the rest has come.
    """
    done = [(f, f.estimate) for f in known]
    numbers = [(f, e) for f, e in done if e is not None]
    # Two questions: is there any difference, and is there none that matters?
    zero = holm([e.p() for _, e in numbers], len(known))
    matter = holm([_excludes(f.test, e) for f, e in numbers], len(known))
    told = {id(f): (p, q) for (f, _), p, q in zip(numbers, zero, matter, strict=True)}
    judged = []
    for finding, estimate in done:
        design = finding.design
        alpha = ALPHA / len(known)
        detects = design.detects(alpha) if design else math.nan
        # Within is two one-sided tests, both of which must see it.
        power = 1 - (1 - POWER) / (2 if finding.test.expect == "within" else 1)
        needs = design.needs(finding.test.matters, alpha, power) if design else None
        if estimate is None:
            reason = "; ".join(finding.waits) or "no interval: fewer than two repetitions"
            judged.append(Judged(finding, math.nan, "not run", reason, detects, needs))
            continue
        if finding.identical:
            same: Word = "supported" if finding.test.expect in _LEVEL else "not supported"
            reason = "the same to the last digit"
            judged.append(Judged(finding, math.nan, same, reason, detects, needs))
            continue
        if not estimate.varied:
            reason = "every repetition differs by the same: no interval"
            judged.append(Judged(finding, math.nan, "can't tell", reason, detects, needs))
            continue
        p, q = told[id(finding)]
        word, reason = _rule(finding.test, estimate, p < ALPHA, q < ALPHA)
        judged.append(Judged(finding, p, word, reason, detects, needs))
    return judged


def _excludes(test: Contrast, e: Estimate) -> float:
    """Two-sided p-value of a difference that matters; 1 where the number lies beyond it.

    In the direction that is asked about, or in both for `within` (two one-sided tests).
    """
    d = test.matters
    above = e.p(d) if e.mean < d else 1.0
    below = e.p(-d) if e.mean > -d else 1.0
    if test.expect == "above":
        return above
    return below if test.expect in ("below", "not_below") else max(above, below)


def _rule(test: Contrast, e: Estimate, differs: bool, excluded: bool) -> tuple[Word, str]:
    """The verdict of one comparison.

    Args:
        test: what is asked.
        e: the number.
        differs: it is told from 0.
        excluded: it is told from a difference that matters (`_excludes`).
    """
    if test.expect == "within":
        return _within(test, e, differs, excluded)
    if test.expect == "not_below":
        return _not_below(test, e, differs, excluded)
    return _falls(e if test.expect == "below" else -e, differs, excluded, test.expect)


def _falls(
    e: Estimate, differs: bool, excluded: bool, side: Literal["above", "below"] = "below"
) -> tuple[Word, str]:
    other = "above" if side == "below" else "below"
    if differs and e.mean < 0:
        if excluded:
            return "not supported", f"{side} 0, by less than what matters"
        return "supported", f"told from 0: {side} it"
    if differs:
        return "not supported", f"told from 0: {other} it"
    if excluded:
        return "not supported", f"not told from 0, and no difference that matters {side} it"
    return "can't tell", "neither 0 nor a difference that matters is ruled out"


def _not_below(test: Contrast, e: Estimate, differs: bool, excluded: bool) -> tuple[Word, str]:
    if excluded:
        return "supported", "no difference that matters below 0"
    if differs and e.mean <= -test.matters:
        return "not supported", "told from 0: below it, and by as much as matters"
    if differs:
        return "can't tell", "told from 0: below it; whether by as much as matters is open"
    return "can't tell", "a difference that matters below 0 is not ruled out"


def _within(test: Contrast, e: Estimate, differs: bool, excluded: bool) -> tuple[Word, str]:
    if excluded:
        return "supported", "less apart than matters"
    if differs and abs(e.mean) >= test.matters:
        return "not supported", "told from 0, and by as much as matters"
    if differs:
        return "can't tell", "told from 0; whether by as much as matters is open"
    return "can't tell", "a difference that matters is not ruled out"


# --- words


def sentence(verdict: Verdict) -> str:
    """The verdict in a sentence or two."""
    ran, word = verdict.ran, verdict.word
    if word == "not run":
        return "Not run."
    n = len(ran)
    missing = len(verdict.each) - n
    are = "is" if missing == 1 else "are"
    tail = f" {missing} of {len(verdict.each)} comparisons {are} not run." if missing else ""
    yes, no, open_ = (verdict.of(w) for w in ("supported", "not supported", "can't tell"))
    whole = {1: "the one comparison", 2: "both comparisons"}.get(n, f"all {n} comparisons")
    if word == "supported":
        run = f" that {'was' if n == 1 else 'were'} run" if missing else ""
        return f"Supported by {whole}{run}.{tail}"
    if len(verdict.of(word)) == n:
        verb = "leave" if word == "can't tell" else "speak"
        said = f"{verb}s" if n == 1 else verb
        head = f"{word[0].upper()}{word[1:]}: {whole} {said}"
        return f"{head} {'it open' if verb == 'leave' else 'against it'}.{tail}"
    parts = [_some(no, n, "speak", "against it"), _some(open_, n, "leave", "it open")]
    parts.append(_some(yes, n, "support", "it"))
    if no:
        parts[0] += f" ({_names(no)})"
    return f"{word[0].upper()}{word[1:]}: {'; '.join(part for part in parts if part)}.{tail}"


def _some(some: Sequence[Judged], n: int, verb: str, what: str) -> str:
    if not some:
        return ""
    one = len(some) == 1
    return f"{len(some)} of {n} comparisons {verb}{'s' if one else ''} {what}"


def _names(some: Sequence[Judged]) -> str:
    return "; ".join(dict.fromkeys(one.finding.label for one in some))


def cure(verdict: Verdict) -> list[str]:
    """What would change it."""
    told = []
    wide = verdict.of("can't tell")
    if wide:
        kind = "pipelines" if not verdict.single else "fine-tunings of each cell"
        counts = [one.needs for one in wide if one.needs is not None]
        if counts:
            told.append(
                f"{max(counts)} {kind} would see the difference that matters with 80% power,"
                " if the baseline's spread stays what it is."
            )
        if any(one.needs is None and one.finding.design for one in wide):
            told.append(
                f"On {_names([o for o in wide if o.needs is None])} more than {MOST} {kind} would"
                " be needed: a smaller spread, as by a larger test split, is."
            )
    if verdict.ran and verdict.single:
        told.append(
            "Further pre-trainings and distillations with seeds of their own: these intervals are"
            " of fine-tuning alone, and another stage 1 might lie outside of them."
        )
    if verdict.of("not run"):
        told.append("What is missing, run by the command below.")
    if verdict.word in ("supported", "not supported") and not wide:
        told.append("Other data sets, or another encoder: the verdict is of those that were run.")
    return told
