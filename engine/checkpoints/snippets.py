"""What an export is, as its own files say, and the code that loads it in each library."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from selfdistill.data import records

Task = Literal[
    "image-classification",
    "image-feature-extraction",
    "text-classification",
    "fill-mask",
    "sentence-similarity",
]


class Found(NamedTuple):
    """An export.

    Attributes:
        kind: of its inputs.
        task: as the hub calls what it does.
        library: that loads it best, as the hub calls it.
        classes: number of them; 0 of an encoder.
        transformers: config.json for transformers, if there is one.
        timm: config.json for timm, if there is one.
        sentences: whether sentence-transformers loads it.
        alone: whether the encoder lies beside it without its decoder.
    """

    kind: Literal["image", "text"]
    task: Task
    library: str
    classes: int
    transformers: dict[str, Any] | None
    timm: dict[str, Any] | None
    sentences: bool
    alone: bool = False

    @property
    def several(self) -> bool:
        """Whether an input may be of several classes."""
        told = (self.transformers or {}, self.timm or {})
        return any(one.get("problem_type") == "multi_label_classification" for one in told)


def look(folder: Path) -> Found:
    """Says what an export is.

    Raises:
        UserError: a file is broken.
    """
    theirs = _config(folder / "config.json")
    timm = _config(folder / "timm" / "config.json")
    sentences = (folder / "modules.json").is_file()
    if timm is not None:
        classes = int(timm.get("num_classes") or 0)
        task: Task = "image-classification" if classes else "image-feature-extraction"
        library = "timm" if theirs is None else "transformers"
        alone = (folder / "encoder" / "config.json").is_file()
        return Found("image", task, library, classes, theirs, timm, False, alone)
    classifies = (folder / "2_Dense").is_dir() or any(
        str(name).endswith("SequenceClassification")
        for name in (theirs or {}).get("architectures") or ()
    )
    classes = len((theirs or {}).get("id2label") or ()) if classifies else 0
    library = "sentence-transformers" if sentences else "transformers"
    if classes:
        return Found("text", "text-classification", library, classes, theirs, None, sentences)
    task = "sentence-similarity" if sentences else "fill-mask"
    return Found("text", task, library, 0, theirs, None, sentences)


def _config(path: Path) -> dict[str, Any] | None:
    return records.read_object(path) if path.is_file() else None


def of(found: Found) -> list[tuple[str, str, str]]:
    """Library, a line about it, and code, for each library that loads an export."""
    made = []
    if found.kind == "image":
        if found.transformers is not None:
            code = _CLASSIFY if found.classes else _ENCODE.format(_plain(found))
            if found.transformers.get("model_type") == "clip_vision_model":
                code = code.replace(*_POOLED)
            made.append(("transformers", "In transformers:", code))
        if found.timm is not None:
            code = _TIMM_CLASSIFY if found.classes else _TIMM_ENCODE
            norm, option = _norm(found.timm)
            several = found.timm.get("problem_type") == "multi_label_classification"
            code = code.replace(".softmax(1)", ".sigmoid()") if several else code
            made.append(("timm", "In timm:", code.format(norm=norm, option=option)))
        return made
    if found.sentences:
        code = _SENTENCE_CLASSES if found.classes else _SENTENCES
        if found.several:
            code = code.replace(
                "print(model[0].auto_model.config.id2label[int(logits.argmax())])", _OVER_HALF
            )
        made.append(("sentence-transformers", "In sentence-transformers:", code))
        return made
    code = _CLASSIFY_TEXT if found.classes else _ENCODE_TEXT
    return [("transformers", "In transformers:", code)]


def _plain(found: Found) -> str:
    """Arguments that leave a decoder out, and a pooler, which these weights lack."""
    alone = ', subfolder="encoder"' if found.alone else ""
    pooled = (found.transformers or {}).get("model_type") in ("vit", "deit")
    return alone + (", add_pooling_layer=False" if pooled else "")


def _norm(config: dict[str, Any]) -> tuple[str, str]:
    """Lines and an argument for timm's LayerNorm, whose eps its configuration cannot tell."""
    eps = config.get("norm_eps")
    line = f"norm = functools.partial(torch.nn.LayerNorm, eps={eps})\n"
    return line, ", norm_layer=norm"


_CLASSIFY = """from transformers import pipeline

classify = pipeline("image-classification", model=".")
print(classify("photo.jpg"))"""
_ENCODE = """import torch
from transformers import AutoImageProcessor, AutoModel
from transformers.image_utils import load_image

processor = AutoImageProcessor.from_pretrained(".")
model = AutoModel.from_pretrained("."{}).eval()
with torch.no_grad():
    found = model(**processor(load_image("photo.jpg"), return_tensors="pt"))
features = found.last_hidden_state  # [1, tokens, width]
print(features.mean(1).shape)"""
#: CLIP's last_hidden_state lacks the last LayerNorm, which its pooled vector has.
_POOLED = (
    """features = found.last_hidden_state  # [1, tokens, width]
print(features.mean(1).shape)""",
    """features = found.pooler_output  # [1, width]: the class token, after the last LayerNorm
print(features.shape)""",
)
_TIMM = """import functools

import timm
import torch
from PIL import Image, ImageOps

{norm}model = timm.create_model("local-dir:timm", pretrained=True{option}).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
"""
_TIMM_CLASSIFY = (
    _TIMM
    + """with torch.no_grad():
    probabilities = model(transform(photo)[None]).softmax(1)[0].tolist()
print(dict(zip(model.pretrained_cfg["label_names"], probabilities)))"""
)
_TIMM_ENCODE = (
    _TIMM
    + """with torch.no_grad():
    features = model.forward_features(transform(photo)[None])  # [1, tokens, width]
print(features.mean(1).shape)"""
)
_CLASSIFY_TEXT = """from transformers import pipeline

classify = pipeline("text-classification", model=".")
print(classify("A text of yours.", truncation=True))"""
_ENCODE_TEXT = """import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModel.from_pretrained(".").eval()
with torch.no_grad():
    found = model(**tokenizer("A text of yours.", return_tensors="pt"))
print(found.last_hidden_state.mean(1).shape)  # [1, width]"""
_SENTENCES = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer(".")
print(model.encode(["A text of yours."]).shape)  # [1, width]"""
_OVER_HALF = """names = model[0].auto_model.config.id2label
print([names[i] for i, logit in enumerate(logits) if logit > 0])  # of more than one half"""
_SENTENCE_CLASSES = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer(".")
logits = model.encode(["A text of yours."])[0]
print(model[0].auto_model.config.id2label[int(logits.argmax())])"""
