"""The lines of `python -m launcher.doctor`, and its checks of Python and the packages."""

import platform
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from selfdistill.data import cli
from selfdistill.data.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Line:
    """What one check found: its state, its name, the finding, and the cure of a failure."""

    state: Literal["ok", "warning", "FAILED"]
    check: str
    found: str
    cure: str = ""

    def __str__(self) -> str:
        cure = f": {self.cure}" if self.cure else ""
        return f"{self.state:8} {self.check}: " + " ".join(f"{self.found}{cure}".split())


def attempt(check: str, look: Callable[[], Line | list[Line]]) -> list[Line]:
    """What a check says; a check that cannot be made is a line as well, never a traceback."""
    try:
        found = look()
        return found if isinstance(found, list) else [found]
    except UserError as error:
        return [Line("FAILED", check, str(error))]
    except OSError as error:
        return [Line("FAILED", check, str(cli.machine_error(error) or error))]
    except Exception as error:  # of any library: the other checks must still run
        what = f"{type(error).__name__}: {cli.format_error(error)}"
        return [Line("FAILED", check, what, "install what is missing, or tell the authors")]


def declared(project: Mapping[str, Any] | None = None) -> tuple[SpecifierSet, list[Requirement]]:
    """The Python versions and the packages that the project asks for.

    Args:
        project: the table `project` of a pyproject.toml; by default that of this clone, or what an
            installed copy says of itself.

    Raises:
        UserError: there is neither.
    """
    if project is None and (file := ROOT / "pyproject.toml").is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    if project is not None:
        python, lines = project["requires-python"], list(project["dependencies"])
    else:
        try:
            python = metadata.metadata("selfdistill")["Requires-Python"]
            lines = metadata.requires("selfdistill") or []
        except metadata.PackageNotFoundError:
            raise UserError("no pyproject.toml: run this from a whole clone") from None
    wanted = [Requirement(line) for line in lines]
    # The markers of optional parts ask for their extra: here none was asked for.
    return SpecifierSet(python), [r for r in wanted if not r.marker or r.marker.evaluate()]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages asked for, "none" for what is missing."""
    found = {"python": platform.python_version()}
    for requirement in declared()[1]:
        try:
            found[requirement.name] = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found[requirement.name] = "none"
    return found


def python(project: Mapping[str, Any] | None = None) -> Line:
    """Whether this Python is one that the project asks for."""
    wanted, version = declared(project)[0], platform.python_version()
    if not wanted.contains(version, prereleases=True):
        cure = "make the environment anew with such a Python (make venv PYTHON=/path/to/python3.11)"
        return Line("FAILED", "Python", f"{version}, {wanted} is needed", cure)
    return Line("ok", "Python", f"{version}, {platform.system()} {platform.release()}")


def packages(project: Mapping[str, Any] | None = None, lock: Path | None = None) -> Line:
    """Whether the packages asked for are there: in the right range, and as they were tested.

    Args:
        project: see `declared`.
        lock: a requirements.lock; by default this clone's.
    """
    lock = lock or ROOT / "requirements.lock"
    locked: dict[str, str] = {}
    if lock.is_file():
        for line in lock.read_text(encoding="utf-8").splitlines():
            name, equals, version = line.partition("#")[0].rstrip(" \\\n").partition("==")
            if equals:
                locked[canonicalize_name(name.strip())] = version.strip()
    wrong, other = [], []
    wanted = declared(project)[1]
    for need in wanted:
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{need.name} is missing ({need.specifier} is needed)")
            continue
        if not need.specifier.contains(version, prereleases=True):
            wrong.append(f"{need.name} is {version} ({need.specifier} is needed)")
        # Builds of one version differ in what follows the plus, as torch 2.15.0+cu130 does.
        tested = locked.get(canonicalize_name(need.name), version)
        if Version(tested).public != Version(version).public:
            other.append(f"{need.name} is {version}, not {tested}")
    cure = "make venv, or pip install --requirement requirements.lock"
    if wrong:
        return Line("FAILED", "packages", ", ".join(wrong), cure)
    if other:
        found = ", ".join(other) + ": in the range, but not what requirements.lock was tested with"
        return Line("warning", "packages", found, cure)
    exact = " as in requirements.lock" if locked else ""
    return Line("ok", "packages", f"{len(wanted)} there{exact}")
