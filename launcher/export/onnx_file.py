"""An export as a file for ONNX's runtimes, compared with PyTorch before it is kept."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from selfdistill.data.errors import UserError, printable
from selfdistill.engine.checkpoints import snippets

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
#: Of the outputs, between onnxruntime and PyTorch in fp32.
LARGEST = 1e-4
#: Bytes of weights beyond which they lie in a file of their own: protobuf's limit is 2^31.
_WHOLE = 1_500_000_000


class Part(NamedTuple):
    """A network to be written.

    Attributes:
        network: takes the examples' tensors in their order.
        names: of its inputs.
        output: name of what it gives.
        axes: of each input, which dimensions vary, with their names.
        examples: for each batch that is compared its tensors; by the first one it is traced.
        told: for the file's metadata.
    """

    network: nn.Module
    names: tuple[str, ...]
    output: str
    axes: dict[int, str]
    examples: list[tuple[Tensor, ...]]
    told: dict[str, str]


def write(folder: Path, out: Path, *, overwrite: bool = False) -> float:
    """Writes the file and says how far its outputs are from PyTorch's.

    Args:
        folder: an export.
        out: the file.
        overwrite: replace one that is there.

    Returns:
        The largest absolute difference over all outputs of batches of two sizes.

    Raises:
        UserError: a package is missing, the file is there, the network cannot be written, or what
            onnxruntime computes differs.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--onnx needs {', '.join(missing)}: pip install {' '.join(missing)} (the extra onnx)"
        )
    if out.suffix != ".onnx":
        raise UserError(f"--onnx {out}: give a file that ends in .onnx")
    data = out.with_name(f"{out.name}.data")
    if not overwrite and (taken := next((p for p in (out, data) if p.exists()), None)):
        raise UserError(f"{taken} is there: give another name, or --overwrite")
    out.parent.mkdir(parents=True, exist_ok=True)
    found = snippets.look(folder)
    if found.kind == "text" and not any(folder.glob("tokenizer*")):
        raise UserError(
            f"{folder} is no export of a run: it has neither timm/config.json, as those of images,"
            " nor a tokenizer, as those of texts"
        )
    _quiet()
    part = (_images if found.kind == "image" else _texts)(folder, found)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        opset = _export(part, beside / out.name)
        difference = _compare(part, beside / out.name)
        if not difference <= LARGEST:
            raise UserError(
                f"{folder}: onnxruntime's {part.output} differ from PyTorch's by {difference:.2g},"
                f" more than {LARGEST:g}: the file was not kept; update onnxruntime and torch"
            )
        data.unlink(missing_ok=True)
        for path in beside.iterdir():
            os.replace(path, out.parent / path.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    inputs = ", ".join(
        f"{name} [{', '.join(part.axes.get(i, str(n)) for i, n in enumerate(example.shape))}]"
        for name, example in zip(part.names, part.examples[0], strict=True)
    )
    sizes = " and ".join(str(len(example[0])) for example in part.examples)
    print(
        printable(
            f"{out}: opset {opset}, {inputs} -> {part.output}; largest difference from PyTorch"
            f" {difference:.2g} (batches of {sizes})"
        )
    )
    return difference


def _quiet() -> None:
    """Leaves the terminal to our own lines: which weights a class leaves out is known here."""
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()
    theirs.disable_progress_bar()


def _images(folder: Path, found: snippets.Found) -> Part:
    """An image model as timm's, which knows every pooling and type."""
    import timm

    assert found.timm is not None
    norm = functools.partial(nn.LayerNorm, eps=found.timm.get("norm_eps", 1e-6))
    network: Any = timm.create_model(
        f"local-dir:{folder / 'timm'}", pretrained=True, norm_layer=norm
    ).eval()
    told = network.pretrained_cfg
    shape = tuple(told["input_size"])
    torch.manual_seed(0)
    examples: list[tuple[Tensor, ...]] = [(torch.randn(n, *shape),) for n in (3, 1)]
    metadata = {key: json.dumps(told.get(key)) for key in ("mean", "std", "crop_mode")}
    if not found.classes:
        return Part(
            _Features(network), ("pixel_values",), "features", {0: "batch"}, examples, metadata
        )
    metadata["classes"] = json.dumps(found.timm.get("label_names"), ensure_ascii=False)
    return Part(network, ("pixel_values",), "logits", {0: "batch"}, examples, metadata)


class _Features(nn.Module):
    """Every token of an image, fp32 [B, T, D]."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor) -> Tensor:
        features: Tensor = self.network.forward_features(pixel_values)
        return features


class _Texts(nn.Module):
    """A text model of transformers, its output by name; or pooled by the mean, with a head."""

    def __init__(
        self, network: Any, names: tuple[str, ...], output: str, head: nn.Linear | None
    ) -> None:
        super().__init__()
        self.network, self.names, self.output, self.head = network, names, output, head

    def forward(self, *inputs: Tensor) -> Tensor:
        given = dict(zip(self.names, inputs, strict=True))
        found: Tensor = getattr(self.network(**given), self.output)
        if self.head is None:
            return found
        counted = given["attention_mask"].unsqueeze(-1).to(found.dtype)
        pooled: Tensor = self.head((found * counted).sum(1) / counted.sum(1).clamp(min=1e-9))
        return pooled


def _texts(folder: Path, found: snippets.Found) -> Part:
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = tuple(name for name in tokenizer.model_input_names if name != "token_type_ids")
    if "token_type_ids" in tokenizer.model_input_names:
        names = (*names, "token_type_ids")
    head = None
    pooled = (folder / "2_Dense" / "model.safetensors").is_file()
    if found.classes and not pooled:
        output = "logits"
        network = AutoModelForSequenceClassification.from_pretrained(
            folder, attn_implementation="eager"
        )
    else:
        output = "last_hidden_state"
        network = AutoModel.from_pretrained(folder, attn_implementation="eager")
    if pooled:
        tensors = load_file(folder / "2_Dense" / "model.safetensors")
        weight = tensors["linear.weight"]
        head = nn.Linear(weight.shape[1], weight.shape[0])
        head.load_state_dict({"weight": weight, "bias": tensors["linear.bias"]})
    generator = torch.Generator().manual_seed(0)
    most = int(network.config.vocab_size)
    examples: list[tuple[Tensor, ...]] = []
    for rows, length in ((3, 9), (1, 14)):
        ids = torch.randint(5, most, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1:, length // 2 :] = 0  # padding, as in a batch of texts of several lengths
        ids = ids.where(mask.bool(), torch.tensor(tokenizer.pad_token_id or 0))
        known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        examples.append(tuple(known[name] for name in names))
    told = {}
    if found.classes:
        labels = network.config.id2label
        told["classes"] = json.dumps([labels[i] for i in sorted(labels)], ensure_ascii=False)
    named = "logits" if found.classes else "features"
    network = _Texts(network.eval(), names, output, head)
    return Part(network.eval(), names, named, {0: "batch", 1: "tokens"}, examples, told)


def _export(part: Part, path: Path) -> int:
    """Writes the file; returns the version of ONNX's operators."""
    import onnx

    dynamic = tuple(dict.fromkeys(part.axes, torch.export.Dim.DYNAMIC) for _ in part.names)
    size = sum(p.numel() * p.element_size() for p in part.network.parameters())
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                part.network,
                part.examples[0],
                str(path),
                input_names=list(part.names),
                output_names=[part.output],
                dynamic_shapes=dynamic if len(dynamic) == 1 else (dynamic,),
                dynamo=True,
                external_data=size > _WHOLE,
                verbose=False,
            )
    except Exception as error:  # of torch.export, of onnxscript: any, and of many lines
        raise UserError(
            f"PyTorch cannot write this network as ONNX ({' '.join(str(error).split())[:160]}):"
            " update torch and onnxscript"
        ) from error
    finally:
        logger.setLevel(before)
    model = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(model, part.told)
    onnx.save(model, path)
    onnx.checker.check_model(str(path))
    return next(int(one.version) for one in model.opset_import if one.domain in ("", "ai.onnx"))


def _compare(part: Part, path: Path) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    largest = 0.0
    for example in part.examples:
        with torch.no_grad():
            wanted = part.network(*example)
        feed = {name: tensor.numpy() for name, tensor in zip(part.names, example, strict=True)}
        found = torch.from_numpy(session.run([part.output], feed)[0])
        if found.shape != wanted.shape:
            return float("inf")
        difference = (found - wanted).abs().max()
        largest = max(largest, float(difference.nan_to_num(nan=float("inf"))))
    return largest
