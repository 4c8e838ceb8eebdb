"""Texts under torch.compile: the same losses and gradients, by graphs that batches share."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from selfdistill.engine.training.objectives import ClassifyObjective, DistillObjective
from tests.engine.models.texts.test_language import batch_of, kind_of
from tests.kit import texts as text_kit


def compiled(objective: nn.Module, graphs: list[Any]) -> Any:
    """An objective compiled whole, its operations run one by one; what was compiled is noted."""

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return torch.compile(objective, backend=backend, fullgraph=True)


def test_compiled_objectives_are_the_plain_ones(tmp_path: Path) -> None:
    """A first graph, and one for any number of masked tokens, which differs at every step."""
    folder = text_kit.make_language(tmp_path / "roberta")
    kind, tokenizer = kind_of(folder, mlm__dropout=0.0), AutoTokenizer.from_pretrained(folder)
    kind.config.finetune.dropout = 0.0
    base, graphs = kind.load(), list[Any]()
    torch.compiler.reset()
    try:
        pair = [DistillObjective(kind.autoencoder(base)).train() for _ in range(2)]
        step = compiled(pair[1], graphs)
        for seed in range(4):
            batch = batch_of(tokenizer, text_kit.SENTENCES, seed)
            del batch["labels"]
            batch |= {"target": torch.randn(4, 24), "scale": torch.tensor(0.3)}
            plain, found = pair[0](**batch), step(**batch)
            for key in ("loss", "mlm", "distill", "cosine"):
                assert torch.allclose(found[key], plain[key], rtol=1e-5), (seed, key)
            plain["loss"].backward()
            found["loss"].backward()
        assert len(graphs) == 2
        for one, other in zip(*(model.parameters() for model in pair), strict=True):
            assert (one.grad is None) == (other.grad is None)
            assert one.grad is None or torch.allclose(one.grad, other.grad, atol=1e-5)
        graphs.clear()
        two = [ClassifyObjective(kind.classifier(base, ["x", "y"], 1)).train() for _ in range(2)]
        step = compiled(two[1], graphs)
        batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
        for labels in (torch.tensor([0, 1, 1, 0]), torch.tensor([1, 1, 0, 0])):
            plain, found = two[0](labels, **batch), step(labels, **batch)
            assert torch.allclose(found["logits"], plain["logits"], atol=1e-5)
        assert len(graphs) == 1
    finally:
        torch.compiler.reset()
