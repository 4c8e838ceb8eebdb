"""Labels that can hardly be what was meant: refused, or told before anything is trained on them."""

import re
import unicodedata
from collections import Counter

from selfdistill.data.errors import UserError, counted
from selfdistill.data.formats.labels import numbers
from selfdistill.data.sources import scored
from selfdistill.data.sources.samples import Splits
from selfdistill.data.splits import DIVIDED, UNLABELLED

# With fewer samples somebody tries things out.
_FEW = 20
_BETWEEN = re.compile(r"\s*[|;,]\s*")
_FRACTION = re.compile(r"[-+]?\d*\.\d*[1-9]\d*(e[-+]?\d+)?|[-+]?\d+e[-+]?\d+", re.IGNORECASE)


def check(splits: Splits) -> list[str]:
    """Looks at the labels of a source's splits.

    Args:
        splits: As they are to be packed.

    Returns:
        What the user should know, a line each.

    Raises:
        UserError: One class only, about as many classes as samples, numbers that are measured, or
            labels of several classes at once.
    """
    counts: dict[str, Counter[str]] = {}
    classes: list[str] = []
    for split, (samples, names) in splits.items():
        if names and split != UNLABELLED:
            classes = names
            counts[split] = Counter(names[i] for s in samples for i in numbers(s.label))
    if not classes:
        return []
    lists = [s.label for part, _ in splits.values() for s in part if isinstance(s.label, tuple)]
    refuse(classes, sum(counter.total() for counter in counts.values()), several=bool(lists))
    notes = []
    if lists:
        empty, labels = lists.count(()), sum(map(len, lists))
        notes.append(
            f"several labels a sample: {labels / len(lists):.2f} on average, {empty} of"
            f" {len(lists)} samples with none"
        )
    elif len(classes) == 1:
        notes.append(f"note: all samples are of one class, {classes[0]!r}: nothing to tell apart")
    folded: dict[str, str] = {}
    for name in classes:
        other = folded.setdefault(_folded(name), name)
        if other != name:
            notes.append(
                f"note: classes {other!r} and {name!r} differ in case, spaces or zeros alone, or in"
                " forms of letters: if they are one, name them alike and pack again"
            )
    if not lists and (joined := _joined(classes)):
        notes.append(
            f"note: {len(joined)} classes such as {joined[0]!r} look like several names in one: if"
            f" they are, give what stands between them (--label_separator"
            f" {_mark(joined[0])!r})"
        )
    for split in DIVIDED[1:]:
        absent = [name for name in classes if split in counts and not counts[split][name]]
        if absent:
            others = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            has = sum(counter[absent[0]] for counter in counts.values())
            named = f"{absent[0]!r} ({counted(has, 'sample', 'samples')} in all){others}"
            have = "has" if len(absent) == 1 else "have"
            notes.append(f"note: class {named} {have} no sample in {split}")
    return notes


def _mark(name: str) -> str:
    """What stands between the names in a label of several."""
    return next(mark for mark in "|;," if mark in name)


def _joined(classes: list[str]) -> list[str]:
    """The names that have parts between ``;`` or ``|``, of which other names consist, too."""
    parts = {name: set(filter(None, re.split(r"\s*[|;]\s*", name))) for name in classes}
    often = Counter(part for own in parts.values() for part in own)
    return [name for name, own in parts.items() if len(own) > 1 and all(often[p] > 1 for p in own)]


def refuse(classes: list[str], samples: int, *, several: bool = False) -> None:
    """Refuses names that can hardly be classes of so many samples; see `check`."""
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"the name of class {name!a} is not UTF-8, so that no manifest can hold it:"
                " rename it"
            ) from None
    cure = "give each sample the name of its class, or pack without labels (--unlabelled)"
    own = scored.classes()
    if own is None:
        _refuse_few_or_many(classes, samples, cure, several=several)
    known = set(classes)
    for name in classes:
        parts = [part for part in _BETWEEN.split(name) if part]
        if len(parts) > 1 and known.issuperset(parts) and name not in (own or ()):
            raise UserError(
                f"the label {name!r} is of several classes ({', '.join(parts)}): where samples may"
                f" have several, say so (--label_separator {_mark(name)!r}); else {cure}"
            )


def _refuse_few_or_many(classes: list[str], samples: int, cure: str, *, several: bool) -> None:
    """Refuses one class alone, measured values, and about as many classes as samples."""
    if samples >= _FEW and len(classes) == 1 and not several:
        raise UserError(
            f"all samples are of one class, {classes[0]!r}: there is nothing to tell apart: {cure}"
        )
    measured = [name for name in classes if _FRACTION.fullmatch(name)]
    if len(measured) > len(classes) / 2 and len(classes) > _FEW / 2:
        raise UserError(
            f"the labels are {len(classes)} different numbers such as {measured[0]}: these are"
            f" measured values, and this program tells classes apart: {cure}"
        )
    if samples >= _FEW and len(classes) > samples / 2:
        raise UserError(
            f"{samples} samples have {len(classes)} different labels, such as {classes[0]!r}:"
            f" these are hardly classes: {cure}"
        )


def _folded(name: str) -> str:
    """A class name as it would be typed carelessly: " 01" and "1.0" are 1, "Cat " is cat."""
    name = unicodedata.normalize("NFC", name)  # macOS has letters and their marks apart
    plain = " ".join(re.split(r"[\s_-]+", name.strip().casefold()))
    if re.fullmatch(r"\d+(\.0*)?", plain):
        return plain.split(".")[0].lstrip("0") or "0"
    return plain
