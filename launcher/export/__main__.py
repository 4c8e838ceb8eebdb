"""python -m launcher.export MODEL --onnx FILE, or --push OWNER/NAME: an export for elsewhere.

MODEL is a run, a stage or an export.
"""

from pathlib import Path

from selfdistill.data import cli
from selfdistill.data.errors import UserError, printable


def main(
    model: str,
    onnx: str | None = None,
    push: str | None = None,
    private: bool = True,
    dry_run: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes an export as an ONNX file, or uploads it to the hub.

    Args:
        model: A run's folder, a stage's, or an export.
        onnx: File to write, such as model.onnx. Pictures come in as the export's processor makes
            them, texts as its tokenizer does; a classifier gives logits, an encoder features. What
            onnxruntime computes is compared with PyTorch, and the largest difference printed.
        push: Repository on the hub, OWNER/NAME, made if it is not there. The token is that of
            `hf auth login`, or HF_TOKEN.
        private: Whether a new repository is for its owner alone.
        dry_run: Check all that --push can check here, and upload nothing.
        overwrite: Replace the file.
    """
    from selfdistill.engine.inference.found import locate

    if (onnx is None) == (push is None):
        raise UserError("give --onnx FILE or --push OWNER/NAME, one of the two")
    if onnx is not None and (dry_run or not private):
        raise UserError("--dry_run and --private are for --push: leave them out, or --onnx")
    if push is not None and overwrite:
        raise UserError("--overwrite is for --onnx: a push adds a commit, and replaces nothing")
    place = locate(model)
    for note in place.notes:
        print(printable(note))
    folder = Path(place.path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{model} is no folder: give a run's, a stage's, or an export")
    if onnx is not None:
        from selfdistill.launcher.export.onnx_file import write

        write(folder, Path(onnx).expanduser(), overwrite=overwrite)
    elif push is not None:
        from selfdistill.launcher.export.hub import upload

        upload(folder, push, private=private, dry_run=dry_run)


if __name__ == "__main__":
    cli.run(main)
