"""Regularizers and ablations on small numbers, against their formulas written out in NumPy."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from selfdistill.data.errors import UserError
from selfdistill.engine.config.schema import Config
from selfdistill.engine.config.sections import R3FSection, RecAdamSection
from selfdistill.engine.regularizers import diet, mars, matching, r3f, recadam, supcon


def test_annealing_never_overflows() -> None:
    assert recadam.annealing(250, 0.1, 250) == 0.5
    assert recadam.annealing(1, 1e6, 1e6) == 0.0
    assert recadam.annealing(10**9, 1e6, 0) == 1.0
    for step in (1, 100, 240, 260, 400):
        wanted = 1 / (1 + math.exp(-0.1 * (step - 250)))
        assert recadam.annealing(step, 0.1, 250) == pytest.approx(wanted, rel=1e-12)


def test_recadam_is_its_formula() -> None:
    """Forty steps of two groups, at changing rates, in float64."""
    config = Config()
    plan, told = config.finetune, RecAdamSection(c=30.0, k=0.3, t0=15.0)
    generator = np.random.default_rng(0)
    start = {name: generator.normal(size=(3, 4)) for name in ("held", "free")}
    params = {k: nn.Parameter(torch.tensor(v)) for k, v in start.items()}
    groups = [
        {"params": [params["held"]], "weight_decay": 0.1, "pulled": True},
        {"params": [params["free"]], "weight_decay": 0.02, "pulled": False},
    ]
    optimizer = recadam.RecAdam(groups, plan, told)
    plain = nn.Parameter(torch.tensor(start["free"]))
    alone = torch.optim.AdamW([plain], betas=plan.betas, eps=plan.eps, weight_decay=0.02)

    (b1, b2), eps = plan.betas, plan.eps
    value = {k: v.copy() for k, v in start.items()}
    m = {k: np.zeros_like(v) for k, v in start.items()}
    v2 = {k: np.zeros_like(v) for k, v in start.items()}
    for t in range(1, 41):
        lr = 0.02 * (41 - t) / 40
        share = 1 / (1 + np.exp(-0.3 * (t - 15)))
        for group in (*optimizer.param_groups, *alone.param_groups):
            group["lr"] = lr
        for name, decay in (("held", 0.1), ("free", 0.02)):
            g = generator.normal(size=(3, 4)) + 0.5
            params[name].grad = torch.tensor(g)
            if name == "free":
                plain.grad = torch.tensor(g)
            m[name] = b1 * m[name] + (1 - b1) * g
            v2[name] = b2 * v2[name] + (1 - b2) * g**2
            adam = (m[name] / (1 - b1**t)) / (np.sqrt(v2[name] / (1 - b2**t)) + eps)
            value[name] *= 1 - lr * decay
            value[name] -= lr * adam * (share if name == "held" else 1)
            if name == "held":
                value[name] -= lr * (1 - share) * 30.0 * (value[name] - start[name])
        optimizer.step()
        alone.step()
        for name in value:
            np.testing.assert_allclose(params[name].detach().numpy(), value[name], rtol=1e-9)
    assert np.abs(value["held"] - start["held"]).max() > 0.05
    assert torch.allclose(params["free"], plain, rtol=1e-12)
    assert torch.equal(optimizer.state[params["held"]]["anchor"], torch.tensor(start["held"]))
    assert "anchor" not in optimizer.state[params["free"]]
    assert optimizer.keeps(params["held"]) == ("exp_avg", "exp_avg_sq", "anchor")
    assert optimizer.keeps(params["free"]) == ("exp_avg", "exp_avg_sq")


def test_recadam_refuses_what_diverges_and_what_it_proposes_is_stable() -> None:
    def settings(**more: float) -> Config:
        config = Config()
        config.zero = "zero0"
        config.finetune.lr, config.finetune.warmup = more.get("lr", 1e-3), 10
        config.recadam.c = more.get("c", 5000.0)
        return config

    recadam.check(settings(lr=1e-4), 1000)  # the paper's rate: 0.5
    with pytest.raises(UserError, match=r"lr \(1 - lambda\) c reaches 5, ") as caught:
        recadam.check(settings(), 1000)
    words = str(caught.value).split()
    c = float(words[words.index("most") + 2].rstrip(","))
    lr = float(words[-1])
    recadam.check(settings(c=c), 1000)
    recadam.check(settings(lr=lr), 1000)
    with pytest.raises(UserError, match="reaches"):
        recadam.check(settings(c=c * 1.02), 1000)
    config = settings(lr=1e-5)
    config.zero = "zero3_offload"
    with pytest.raises(UserError, match="take zero0, zero1, zero2 or zero3"):
        recadam.check(config, 1000)

    def last(c: float) -> float:
        p = nn.Parameter(torch.ones(1))
        told = RecAdamSection(c=c, k=0.1, t0=1e6)
        optimizer = recadam.RecAdam(
            [{"params": [p], "weight_decay": 0.0, "pulled": True}], config.finetune, told
        )
        for step in range(60):
            p.grad = torch.ones(1)
            p.data += 1e-3 if step == 1 else 0
            optimizer.param_groups[0]["lr"] = 1e-3
            optimizer.step()
        return abs(float(p.detach()) - 1)

    # The factor is 1 - lr c: below -1 the distance grows, above it shrinks.
    assert last(1900) < 1e-3 < last(2100)


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 2, 2)])
@pytest.mark.parametrize("around_zero", [True, False])
def test_mars_projects_each_row_by_itself(shape: tuple[int, ...], around_zero: bool) -> None:
    generator = np.random.default_rng(1)
    weight = generator.normal(size=shape)
    start = np.zeros(shape) if around_zero else generator.normal(size=shape)
    weight[1] = start[1] + 1e-3  # within the radius
    wanted, radius = weight.copy(), 1.5
    for row in range(shape[0]):
        away = weight[row] - start[row]
        size = sum(abs(x) for x in away.reshape(-1))
        if size > radius:
            wanted[row] = start[row] + away * radius / size
    origin = None if around_zero else torch.tensor(start)
    found = mars.project(torch.tensor(weight), origin, radius)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)
    assert np.array_equal(found.numpy()[1], weight[1])
    assert np.abs(found.numpy() - weight)[0].max() > 0.01
    # Of all points within the radius on the ray, the farthest: the limit is reached.
    sizes = np.abs(found.numpy() - start).reshape(shape[0], -1).sum(1)
    assert sizes.max() == pytest.approx(radius)
    assert torch.equal(mars.project(torch.tensor(weight), origin, 1e9), torch.tensor(weight))


class Tiny(nn.Module):
    """A classifier of the pattern that the objective takes: an embedding, a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 3)

    def classify(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.tanh(self.embedding(ids)).sum(1))
        return logits


@pytest.mark.parametrize("noise", ["uniform", "normal"])
def test_r3f_is_its_formula(noise: str) -> None:
    """Loss and gradient, with noise large enough to matter; the gradient by differences."""
    torch.manual_seed(0)
    model = Tiny().double()
    told = R3FSection(weight=0.7, noise=noise, eps=0.4)
    objective = r3f.R3FObjective(model, told).train()
    ids, labels = torch.randint(0, 11, (4, 5)), torch.tensor([0, 2, 1, 1])
    keys, lengths = torch.tensor([3, 2**62 + 5, 9, 9]), torch.tensor([5, 2, 5, 5])

    drawn = []
    for key, length in zip(keys.tolist(), lengths.tolist(), strict=True):
        generator = torch.Generator().manual_seed(key)
        values = torch.zeros(5, 6)
        if noise == "normal":
            values[:length] = torch.randn(length, 6, generator=generator) * 0.4
        else:
            values[:length] = torch.rand(length, 6, generator=generator) * 0.8 - 0.4
        drawn.append(values.double().numpy())

    def formula() -> float:
        table, weight, bias = (p.detach().numpy() for p in model.parameters())
        total = 0.0
        for row in range(4):
            p, q = (
                softmax(np.tanh(table[ids[row]] + d).sum(0) @ weight.T + bias)
                for d in (0 * drawn[row], drawn[row])
            )
            total -= math.log(p[labels[row]])
            total += 0.7 * sum(
                p[k] * math.log(p[k] / q[k]) + q[k] * math.log(q[k] / p[k]) for k in range(3)
            )
        return total / 4

    out = objective(labels, keys, lengths, ids=ids)
    term, clean = float(out["r3f"]), float(out["cross_entropy"])
    assert term > 0.01
    assert out["loss"].item() == pytest.approx(clean + 0.7 * term, rel=1e-6)
    assert out["loss"].item() == pytest.approx(formula(), rel=1e-5)
    out["loss"].backward()
    for parameter in model.parameters():
        place = (0,) if parameter.ndim == 1 else (int(ids[0, 0]) % len(parameter), 1)
        step = 1e-4
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[place] += sign * step
                sides.append(formula())
                parameter[place] -= sign * step
        difference = (sides[0] - sides[1]) / (2 * step)
        assert float(parameter.grad[place]) == pytest.approx(difference, rel=1e-3, abs=1e-6)

    # A sample's noise is its own: not its place's, nor its neighbours', nor its padding's.
    longer = torch.cat([ids, torch.zeros(4, 3, dtype=torch.int64)], 1)
    hook = r3f.Noise(told)
    hook.keys, hook.lengths = keys.flip(0), lengths.flip(0)
    again = hook.draw(model.embedding(longer).float())
    np.testing.assert_allclose(again[:, :5].flip(0).numpy(), np.stack(drawn), rtol=1e-6)
    assert (again[:, 5:] == 0).all()
    # Nor that of the texts with which it shares a row.
    hook.keys, hook.lengths, hook.places = keys, lengths, torch.tensor([0, 5, 15, 10])
    rows = hook.draw(torch.zeros(2, 10, 6)).flatten(0, 1)
    for place, length, wanted in zip(hook.places.tolist(), lengths.tolist(), drawn, strict=True):
        np.testing.assert_allclose(rows[place : place + length], wanted[:length], rtol=1e-6)
    assert (rows[7:10] == 0).all()
    assert set(objective.eval()(labels, keys, lengths, ids=ids)) == {
        "loss",
        "cross_entropy",
        "logits",
    }


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return np.asarray(e / e.sum())


def test_supcon_is_its_formula() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(8, 5))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = np.array([0, 1, 2, 1, 0, 1, 2, 1])  # two views of four samples, two of one class
    wanted = 0.0
    for i in range(8):
        positives = [p for p in range(8) if p != i and labels[p] == labels[i]]
        total = sum(math.exp(vectors[i] @ vectors[a] / 0.2) for a in range(8) if a != i)
        for p in positives:
            share = math.exp(vectors[i] @ vectors[p] / 0.2) / total
            wanted -= math.log(share) / len(positives) / 8
    found = supcon.contrast(torch.tensor(vectors), torch.tensor(labels), 0.2)
    assert float(found) == pytest.approx(wanted, rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):  # in which a step in bf16 computes its losses
        found = supcon.contrast(torch.tensor(vectors), torch.tensor(labels), 0.2)
    assert float(found) == pytest.approx(wanted, rel=1e-6)


def test_diet_is_its_formula() -> None:
    """-(1 - s) log p of the own number - s times the mean log p of all."""
    torch.manual_seed(0)
    objective = diet.DietObjective(Autoencoder(), "cls", 2, 5, 0.8)
    x, ids = torch.randn(3, 2), torch.tensor([4, 0, 2])
    found = objective(ids, x=x)
    features = objective.model.encode(x)[0][:, 0].detach().numpy().astype(np.float64)
    head = objective.head.weight.detach().numpy().astype(np.float64)
    wanted = 0.0
    for feature, own in zip(features, ids.tolist(), strict=True):
        logs = np.log(softmax(head @ feature))
        wanted -= (0.2 * logs[own] + 0.8 * logs.mean()) / 3
    assert float(found["loss"]) == pytest.approx(wanted, rel=1e-5)
    found["loss"].backward()
    assert objective.model.decoder.weight.grad is None
    diet.check(2_000_000, "set")
    with pytest.raises(UserError, match="each of 2,000,001 samples of set"):
        diet.check(2_000_001, "set")


class Autoencoder(nn.Module):
    """Two linear maps and a table; `encode` is that of two views."""

    loss_name = "mae"

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"table": nn.Embedding(3, 2), "map": nn.Linear(2, 2)})
        self.decoder = nn.Linear(2, 4)

    def encode(self, x: torch.Tensor, **_: bool) -> tuple[torch.Tensor, None]:
        return self.encoder["map"](x)[:, None], None

    def reconstruct(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        raise AssertionError("there is no masked pass")


def test_distances_by_hand() -> None:
    model = Autoencoder()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    reference = {n: torch.zeros_like(p) for n, p in model.encoder.named_parameters()}
    reference["map.weight"] = torch.tensor([[1.0, -2.0], [3.0, 2.0]])
    # Table: six ones; bias: two; weights: 0, 3, -2, -1 apart.
    l2 = matching.weight_distance(model.encoder, reference, "l2")
    assert float(l2) == 6 + 2 + 9 + 4 + 1
    # Rows of the weights: 3 and 3; biases and tables of vectors are no linear maps.
    rows = matching.weight_distance(model.encoder, reference, "mars")
    assert float(rows) == 3
    reference["map.weight"][1, 0] = 6.0  # 5 and 1: the second row is the farther one
    assert float(matching.weight_distance(model.encoder, reference, "mars")) == 6

    objective = matching.WeightsObjective(model, reference, "l2", 0.5, 0.0)
    out = objective(x=torch.ones(1, 2))
    assert float(out["loss"]) == 0.5 * float(out["distill"]) == 0.5 * (6 + 2 + 9 + 25 + 1)
    out["loss"].backward()
    assert torch.equal(model.encoder["map"].bias.grad, torch.ones(2))  # 0.5 * 2 * (1 - 0)
    assert not any(p.requires_grad for p in model.decoder.parameters())
    assert all(p.requires_grad for p in model.encoder.parameters())

    patches = torch.tensor([[[1.0, 2.0], [0.0, 1.0]], [[0.0, 0.0], [3.0, 1.0]]])
    told = matching.prediction_distance(patches, torch.zeros(2, 2, 2), 2)
    assert float(told) == (1 + 4 + 1 + 9 + 1) / 2
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    wanted = 0.0
    for s, t in zip(student.double().numpy(), teacher.double().numpy(), strict=True):
        p, q = softmax(t), softmax(s)
        wanted += sum(p[k] * math.log(p[k] / q[k]) for k in range(7))
    found = matching.prediction_distance(student, teacher, 3)
    assert float(found) == pytest.approx(wanted / 3, rel=1e-5)  # five tokens of three texts
