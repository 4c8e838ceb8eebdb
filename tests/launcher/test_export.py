"""Exports for elsewhere: ONNX files that compute the same, and uploads that a hub takes."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForSequenceClassification

from selfdistill.data.errors import UserError
from selfdistill.engine.checkpoints.export import export_classifier
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.vit_mae import ViTClassifier, ViTEncoder
from selfdistill.launcher.export import hub, onnx_file
from selfdistill.launcher.export.__main__ import main
from tests.kit import models as kit
from tests.kit import texts as text_kit
from tests.kit.launches import free_port

CARD = "---\nlicense: mit\nlibrary_name: transformers\npipeline_tag: {}\n---\n# It\n"
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ViTClassifier]:
    folder = tmp_path_factory.mktemp("export") / "pictures"
    shape = Shape(16, 4, 32, 2, 2, 64, 16, 1, 2, 32, norm_eps=1e-6)
    model = ViTClassifier(ViTEncoder(shape), 3, pool="mean").eval()
    kit.randomise(model)
    parts = model.encoder.state_dict(), model.head.state_dict()
    export_classifier(folder, shape, *parts, ["a", "Löwe", "c"], "mean", MEAN, STD)
    (folder / "README.md").write_text(CARD.format("image-classification"))
    return folder, model


def session(path: Path) -> Any:
    onnx.checker.check_model(str(path))
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_a_picture_classifier(
    pictures: tuple[Path, ViTClassifier], tmp_path: Path, capsys: Any
) -> None:
    folder, model = pictures
    main(str(folder), onnx=str(tmp_path / "out" / "m.onnx"))
    said = capsys.readouterr().out
    assert "m.onnx: opset " in said
    assert "pixel_values [batch, 3, 16, 16] -> logits; largest difference" in said
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["m.onnx"]
    with pytest.raises(UserError, match="are for --push"):
        main(str(folder), onnx=str(tmp_path / "out" / "n.onnx"), dry_run=True)
    assert not (tmp_path / "out" / "n.onnx").exists()
    with pytest.raises(UserError, match="--overwrite is for --onnx"):
        main(str(folder), push="me/mine", dry_run=True, overwrite=True)
    run = session(tmp_path / "out" / "m.onnx")
    told = run.get_modelmeta().custom_metadata_map
    assert json.loads(told["classes"]) == ["a", "Löwe", "c"]
    assert json.loads(told["mean"]) == list(MEAN)
    for count in (1, 5):  # of others than it was compared with
        images = torch.randn(count, 3, 16, 16)
        found = run.run(["logits"], {"pixel_values": images.numpy()})[0]
        with torch.no_grad():
            np.testing.assert_allclose(found, model(images).numpy(), atol=1e-4)
    with pytest.raises(UserError, match="is there: give another name, or --overwrite"):
        main(str(folder), onnx=str(tmp_path / "out" / "m.onnx"))


def test_a_text_classifier(tmp_path: Path) -> None:
    """Of texts of another length and number than it was traced with, padding among them."""
    config = text_kit.config_of("roberta", len(tokenizer := text_kit.make_tokenizer()))
    config.num_labels = 2
    config.id2label = {0: "no", 1: "yes"}
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path / "texts")
    tokenizer.save_pretrained(tmp_path / "texts")
    assert onnx_file.write(tmp_path / "texts", tmp_path / "t.onnx") < 1e-4
    run = session(tmp_path / "t.onnx")
    assert json.loads(run.get_modelmeta().custom_metadata_map["classes"]) == ["no", "yes"]
    texts = [text_kit.SENTENCES[0], f"{text_kit.SENTENCES[1]} {text_kit.SENTENCES[2]}"] * 2
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert not batch["attention_mask"].all()
    names = [i.name for i in run.get_inputs()]
    found = run.run(["logits"], {name: batch[name].numpy() for name in names})[0]
    with torch.no_grad():
        np.testing.assert_allclose(found, model(**batch).logits.numpy(), atol=1e-4)


def test_what_differs_is_not_kept(
    pictures: tuple[Path, ViTClassifier], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(part: onnx_file.Part, path: Path) -> int:
        path.write_bytes(b"x")
        return 20

    monkeypatch.setattr(onnx_file, "_export", wrong)
    monkeypatch.setattr(onnx_file, "_compare", lambda *_: float("nan"))
    with pytest.raises(UserError, match="the file was not kept"):
        onnx_file.write(pictures[0], tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"is no export of a run: it has neither timm/config\.json"):
        main(str(tmp_path), onnx=str(tmp_path / "none.onnx"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="--onnx needs onnx, onnxruntime, onnxscript: pip install"):
        onnx_file.write(pictures[0], tmp_path / "m.onnx")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as a commit of small files needs."""

    files: dict[str, bytes]
    made: list[dict[str, Any]]

    def do_POST(self) -> None:
        if self.headers.get("Authorization") != "Bearer secret":
            return self.answer({"error": "Invalid credentials"}, 401)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            return self.answer({"url": f"http://{self.headers['Host']}/me/model"})
        if self.path.endswith("/preupload/main"):
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.answer({"files": modes})
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[line["value"]["path"]] = content
            url = f"http://{self.headers['Host']}/me/model/commit/abc"
            return self.answer({"commitUrl": url, "commitOid": "abc", "success": True})
        return self.answer({"errors": [], "warnings": []})  # of /api/validate-yaml

    def do_GET(self) -> None:
        self.answer({"siblings": [], "id": "me/model", "sha": None})

    def answer(self, content: dict[str, Any], code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    Hub.files, Hub.made = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_upload(
    pictures: tuple[Path, ViTClassifier],
    address: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    """By huggingface_hub itself, to a server on loopback."""
    folder = pictures[0]
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "secret")
    main(str(folder), push="me/model")
    said = capsys.readouterr().out
    assert "image-classification -> me/model" in said
    assert f"{address}/me/model" in said
    assert "private" in (Hub.made[0].get("visibility"), "private" * Hub.made[0].get("private", 0))
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert Hub.files.keys() == files
    for name in files:
        assert Hub.files[name] == (folder / name).read_bytes()


def test_what_an_upload_needs(
    pictures: tuple[Path, ViTClassifier],
    address: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: Any,
) -> None:
    folder = pictures[0]
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("HF_TOKEN", "other")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    with pytest.raises(UserError, match=r"the hub refuses me/model .*hf auth login"):
        hub.upload(folder, "me/model", private=True, dry_run=False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match=r"the hub cannot be reached .*with a network"):
        hub.upload(folder, "me/model", private=True, dry_run=False)
    hub.upload(folder, "me/model", private=True, dry_run=True)
    assert "ready for me/model; nothing was uploaded" in capsys.readouterr().out
    for name, line in (("model", "give OWNER/NAME"), ("a/b c", "--push a/b c: "), ("a--b/c", "--")):
        with pytest.raises(UserError, match=line):
            hub.upload(folder, name, private=True, dry_run=False)
    with pytest.raises(UserError, match="one of the two"):
        main(str(folder))
    with pytest.raises(UserError, match=r"is not there\. Give a run's folder"):
        main(str(tmp_path / "nothing"), push="me/model")
