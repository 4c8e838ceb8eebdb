"""Options that a launch has no use for are named."""

import pytest

from selfdistill.engine.config.idle import idle, of_other_kind
from selfdistill.engine.config.options import load, parse

R3F = "--finetune.regularizer r3f"


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        ("--stage all --recadam.c 5 --finetune.regularizer recadam --diet.smoothing 0.1"
         " --pretrain.objective diet --adapt lora --lora.rank 4", []),
        ("--recadam.c 5 --recadam.k 1",
         ["of no use with --finetune.regularizer none: --recadam.c, --recadam.k, which go with"
          " --finetune.regularizer recadam"]),
        (f"{R3F} --mars.radius 1",
         ["of no use with --finetune.regularizer r3f: --mars.radius, which goes with"
          " --finetune.regularizer mars"]),
        ("--stage finetune --r3f.eps 1 --pretrain.lr 1 --teacher x --mlm.ratio 0.2 --lora.rank 4",
         ["of no use to --stage finetune: --lora.rank, --mlm.ratio, --pretrain.lr, --teacher",
          "of no use with --finetune.regularizer none: --r3f.eps, which goes with"
          " --finetune.regularizer r3f"]),
        ("--stage pretrain --supcon.temperature 1 --distill.feature mean",
         ["of no use to --stage pretrain: --distill.feature",
          "of no use with --pretrain.objective mae: --supcon.temperature, which goes with"
          " --pretrain.objective supcon"]),
        ("--stage pretrain --probe.every auto --distill.feature mean", []),
        ("--stage distill --model x --model.shape.width 8 --compile_mode max-autotune",
         ["of no use with --compile false: --compile_mode, which goes with --compile true",
          "of no use with --model x: --model.shape.width, which goes with --model scratch"]),
        ("--stage pretrain --decoder.width 64", []),
        ("--stage finetune --decoder.width 64 --decoder.depth 2",
         ["of no use to --stage finetune: --decoder.depth, --decoder.width"]),
        ("--stage all --recipe quickstart", []),
    ],
)  # fmt: skip
def test_what_is_typed_for_nothing_is_named(words: str, lines: list[str]) -> None:
    assert idle(load(parse(words.split()))) == lines


def test_options_of_the_other_kind_of_input_are_named() -> None:
    config = load(parse(["--mae.ratio", "0.5", "--text.bucket", "8"]))
    assert of_other_kind(config, "image") == "of no use to images: --text.bucket"
    assert of_other_kind(load(parse(["--text.bucket", "8"])), "text") == ""
    words = "--mae.ratio 0.5 --finetune.flip false --decoder.width 64"
    config = load(parse(words.split()))
    found = "of no use to texts: --decoder.width, --finetune.flip, --mae.ratio"
    assert of_other_kind(config, "text") == found
