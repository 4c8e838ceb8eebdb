"""python -m data.tokenizer SHARDS OUT: a byte-level BPE tokenizer, learnt from packed texts.

For a language model from scratch; a published model brings the tokenizer that it was trained with.
OUT gets the files of transformers' RobertaTokenizer, with RoBERTa's special tokens and template.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from selfdistill.data.cli import run
from selfdistill.data.errors import UserError
from selfdistill.data.formats import texts
from selfdistill.data.loading.reader import Reader
from selfdistill.data.packing.writer import make_folder
from selfdistill.data.shards.manifest import Manifest

#: RoBERTa's special tokens; a token's place here is its id (Liu et al. 2019).
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

#: 256 bytes and the special tokens: what a byte-level vocabulary cannot do without.
SMALLEST = 256 + len(SPECIAL)


def learn(lines: Iterator[str], entries: int, length: int | None = None) -> Tokenizer:
    """Learns merges of byte pairs (Sennrich et al. 2016; on bytes: Radford et al. 2019).

    Args:
        lines: the texts.
        entries: size of the vocabulary, special tokens and bytes among it.
        length: number of texts, for the progress line.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        # Typed into a sentence, the mask stands for a word and the space before it, as RoBERTa's.
        special_tokens=[*SPECIAL[:-1], AddedToken(SPECIAL[-1], lstrip=True, special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    raw.train_from_iterator(lines, trainer, length=length)
    raw.post_processor = processors.RobertaProcessing(
        ("</s>", SPECIAL.index("</s>")), ("<s>", SPECIAL.index("<s>")), add_prefix_space=False
    )
    return raw


def tokenizer(
    shards: str,
    out: str,
    entries: int = 8192,
    split: Literal["train", "val", "test", "unlabelled"] = "train",
    max_length: int = 512,
) -> None:
    """Learns a tokenizer from a packed set of texts.

    Args:
        shards: Folder made by python -m data.pack.
        out: Folder for the tokenizer; must not exist.
        entries: Size of the vocabulary.
        split: Which texts to learn from.
        max_length: Longest input in tokens, noted for the models that use it.
    """
    from transformers import PreTrainedTokenizerFast  # seconds to import

    if entries < SMALLEST:
        raise UserError(
            f"--entries {entries}: bytes and special tokens alone are {SMALLEST}: give more"
        )
    if max_length < 3:
        raise UserError(f"--max_length {max_length}: give 3 or more")
    if Path(out).exists():
        raise UserError(f"{out} exists: give another folder")
    manifest = Manifest.load_split(shards, split)
    if manifest.kind != "text":
        raise UserError(f"{manifest.root} holds {manifest.kind}s, no texts: give packed texts")
    raw = learn(_texts(manifest), entries, manifest.samples)
    if raw.get_vocab_size() < entries:
        Console(stderr=True).print(
            f"these texts give {raw.get_vocab_size()} entries, not {entries}", highlight=False
        )
    named = dict(zip(("bos", "pad", "eos", "unk", "mask"), SPECIAL, strict=True))
    named |= {"cls": named["bos"], "sep": named["eos"]}
    make_folder(Path(out))
    PreTrainedTokenizerFast(
        tokenizer_object=raw,
        model_max_length=max_length,
        **{f"{name}_token": token for name, token in named.items()},
    ).save_pretrained(out)
    print(f"{out}: {raw.get_vocab_size()} entries from {manifest.samples} texts")


def _texts(manifest: Manifest) -> Iterator[str]:
    reader = Reader(manifest)
    for number in range(manifest.samples):
        record = reader.record(number)
        found = texts.parse(record.input, record.name, manifest.text["stored"])
        yield found.text
        if found.pair is not None:
            yield found.pair


if __name__ == "__main__":
    run(tokenizer)
