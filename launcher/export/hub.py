"""Uploads an export to the hub, after all has been checked that can be checked without it."""

from __future__ import annotations

from pathlib import Path

from selfdistill.data.errors import UserError, printable
from selfdistill.engine.checkpoints.card import FILE, read_card


def upload(folder: Path, name: str, *, private: bool, dry_run: bool) -> None:
    """Makes a repository on the hub and commits the folder to it; prints where it lies.

    What the repository holds already stays in its history.

    Args:
        folder: the export.
        name: OWNER/NAME.
        private: whether a new repository is for its owner alone.
        dry_run: upload nothing.

    Raises:
        UserError: the name, the card or the folder are none that the hub takes, there is no token,
            or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push {name}: {' '.join(str(error).split())[:160]}") from error
    if "/" not in name:
        raise UserError(f"--push {name}: give OWNER/NAME, your name on the hub and the model's")
    told = read_card(folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    what = f"{len(files)} files, {size / 1e6:.1f} MB, {told['pipeline_tag']}"
    if told["license"] == "unknown":
        print(
            printable(
                f"warning: {folder / FILE} says license: unknown: put the base's there, if it"
                " allows to pass this on"
            )
        )
    if dry_run:
        print(printable(f"{folder}: {what}: ready for {name}; nothing was uploaded (--dry_run)"))
        return
    print(printable(f"{folder}: {what} -> {name}"), flush=True)
    api = HfApi()
    try:
        made = api.create_repo(name, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Export of selfdistill"
        )
    except LocalTokenNotFoundError as error:
        raise UserError(
            f"the hub wants to know who you are ({' '.join(str(error).split())[:100]}): hf auth"
            " login, or set HF_TOKEN"
        ) from error
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else 0
        cure = "try again later"
        if code in (401, 403):
            cure = "hf auth login with a token that may write, and give your own OWNER"
        raise UserError(
            f"the hub refuses {name} ({' '.join(str(error).split())[:160]}): {cure}"
        ) from error
    except Exception as error:
        if not _unreached(error):
            raise
        raise UserError(
            f"the hub cannot be reached ({' '.join(str(error).split())[:120]}): run this on a"
            f" machine with a network, or copy {folder} there"
        ) from error
    print(printable(f"{made}: {getattr(done, 'oid', '')[:12]}".rstrip(": ")))


def _unreached(error: BaseException) -> bool:
    """Whether no answer came: huggingface_hub lets its HTTP library's own errors through."""
    names = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    known = ("httpx", "httpcore", "requests", "urllib3")
    return any(name.startswith(known) for name in names) or isinstance(error, OSError)
