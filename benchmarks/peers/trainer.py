"""Peer (b): what transformers' `Trainer` with DeepSpeed gives, written with care.

One forward and one backward a step, SDPA, fused AdamW, the same precision as ours, no ZeRO where it
has nothing to shard (one process, fp32), batches put together beforehand, no look for NaN at every
loss; the teacher is run at every step, since the `Trainer` keeps no table of its features.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.peers.plain import classifier, classify_loss, full_view, masked_loss
from benchmarks.sizes import SIZES, Batch, Stage, network


class Objective(nn.Module):
    """All losses of a stage in one forward."""

    def __init__(self, name: str, stage: Stage) -> None:
        super().__init__()
        self.stage, self.feature = stage, SIZES[name].feature
        self.model = classifier(name) if stage == "finetune" else network(name, 0)

    def forward(self, target: Tensor | None = None, **batch: Tensor) -> dict[str, Tensor]:
        """`loss`, of a peer's batch and the teacher's features [B, D]."""
        if self.stage == "finetune":
            return {"loss": classify_loss(self.model, batch)}
        loss = masked_loss(self.model, batch)
        if target is not None:
            feature = full_view(self.model, batch, self.feature).float()
            loss = loss + (feature - target.float()).pow(2).sum(-1).mean()
        return {"loss": loss}


class Taught(Trainer):
    """A `Trainer` that asks the teacher."""

    def __init__(self, teacher: nn.Module | None, feature: str, **options: Any) -> None:
        super().__init__(**options)
        self.teacher, self.feature = teacher, feature
        self.last: Tensor | None = None

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        """See `Trainer`."""
        if self.teacher is not None:
            with torch.no_grad():
                inputs = inputs | {"target": full_view(self.teacher, inputs, self.feature)}
        loss = model(**inputs)["loss"]
        self.last = loss.detach()
        return loss

    def _get_train_sampler(self, *_: Any) -> Any:
        assert isinstance(self.train_dataset, Repeated)
        return SequentialSampler(self.train_dataset)


class Repeated(Dataset[Batch]):
    """Whole batches, over and over."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return 10**7

    def __getitem__(self, index: int) -> Batch:
        return self.batches[index % len(self.batches)]


def _only(batches: list[Batch]) -> Batch:
    """Of a DataLoader's list, the one."""
    return batches[0]


class Rounds(TrainerCallback):
    """Calls back after every step."""

    def __init__(self, after: Callable[[], bool]) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See `TrainerCallback`."""
        if not self.after():
            control.should_training_stop = True


def race(
    name: str,
    stage: Stage,
    lr: float,
    precision: str,
    batches: list[Batch],
    after: Callable[[Tensor], bool],
) -> None:
    """Trains until `after`, told the loss of every step, says no."""
    cuda = torch.cuda.is_available()
    deepspeed = {
        "zero_optimization": {"stage": 0 if precision == "fp32" else 1},
        "gradient_clipping": 1.0 if stage == "finetune" else 0.0,
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "bf16": {"enabled": precision == "bf16"},
        "zero_allow_untested_optimizer": True,
    }
    teacher = None
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,  # a whole batch
            logging_nan_inf_filter=False,
            max_steps=10**6,
            learning_rate=lr,
            weight_decay=0.01,
            adam_beta2=0.95,
            max_grad_norm=1.0 if stage == "finetune" else 0.0,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            bf16=precision == "bf16",
            deepspeed=deepspeed,
            use_cpu=not cuda,
            dataloader_pin_memory=cuda,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        if stage == "distill":
            teacher = network(name, 1).to(arguments.device).eval()
            if precision == "bf16":
                teacher.bfloat16()

        def over() -> bool:
            assert trainer.last is not None
            return after(trainer.last)

        trainer = Taught(
            teacher,
            SIZES[name].feature,
            model=Objective(name, stage),
            args=arguments,
            train_dataset=Repeated(batches),
            data_collator=_only,
            callbacks=[Rounds(over)],
        )
        trainer.train()
