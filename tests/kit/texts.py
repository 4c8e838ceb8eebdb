"""Tiny tokenizers and language models, made by tokenizers and transformers themselves."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    CamembertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    EuroBertConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLMRobertaConfig,
)

from selfdistill.data.packing.encoding import TextModality
from selfdistill.data.packing.writer import write_split
from selfdistill.data.sources.samples import Sample

SENTENCES = [
    "the cell divides and the protein binds",
    "a robust parser for free word order",
    "we are happy to see the goal",
    "the rate of growth was small, as expected",
]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def make_tokenizer(*, mask: bool = True, longest: int = 62, segments: bool = False) -> Any:
    """A byte-level BPE with RoBERTa's special tokens and template; with BERT's, of segments."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = SPECIAL if mask else SPECIAL[:-1]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(SENTENCES, trainer)
    raw.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    if segments:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> $B:1 </s>:1",
            special_tokens=[("<s>", 0), ("</s>", 2)],
        )
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    names |= {"pad_token": "<pad>", "unk_token": "<unk>"}
    if mask:
        names["mask_token"] = "<mask>"
    told = ["input_ids", *(["token_type_ids"] if segments else []), "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, model_max_length=longest, model_input_names=told, **names
    )


def make_other(kind: str, *, longest: int = 62) -> Any:
    """A tokenizer of BERT's kind ("wordpiece"), or of XLM-R's and DeBERTa's ("sentencepiece")."""
    trainer: Any
    if kind == "wordpiece":
        raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
        raw.normalizer = normalizers.BertNormalizer(lowercase=True)
        raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        raw.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=120, special_tokens=SPECIAL, show_progress=False
        )
    else:
        raw = Tokenizer(models.Unigram())
        spaces = normalizers.Replace(Regex(r"\s+"), " ")  # as these models' own have it
        raw.normalizer = normalizers.Sequence([normalizers.NFKC(), spaces])
        raw.pre_tokenizer = pre_tokenizers.Metaspace()
        raw.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    raw.train_from_iterator(SENTENCES * 5, trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    names |= {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=longest, **names)


def config_of(kind: str, vocabulary: int) -> PreTrainedConfig:
    """A model of two layers, 24 wide, without dropout."""
    if kind == "distilbert":
        return DistilBertConfig(
            vocab_size=vocabulary,
            dim=24,
            n_layers=2,
            n_heads=2,
            hidden_dim=48,
            max_position_embeddings=64,
            pad_token_id=1,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
        )
    factory = {
        "roberta": RobertaConfig,
        "xlm-roberta": XLMRobertaConfig,
        "camembert": CamembertConfig,
        "mpnet": MPNetConfig,
        "bert": BertConfig,
        "deberta-v2": DebertaV2Config,
        "electra": ElectraConfig,
        "modernbert": ModernBertConfig,
        "eurobert": EuroBertConfig,
    }[kind]
    # A window that is smaller than the texts: of a larger one layers never know.
    own = {"eurobert": {"tie_word_embeddings": True}, "modernbert": {"local_attention": 8}}
    more: dict[str, Any] = own.get(kind, {})
    return factory(
        **more,
        vocab_size=vocabulary,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def make_language(
    folder: Path, *, kind: str = "roberta", seed: int = 0, tokenizer: Any = None
) -> Path:
    """A random masked language model in a folder, with its tokenizer."""
    tokenizer = tokenizer or make_tokenizer()
    torch.manual_seed(seed)
    model = AutoModelForMaskedLM.from_config(config_of(kind, len(tokenizer)))
    with torch.no_grad():  # transformers leaves biases at zero: nothing would show a lost one
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_texts(root: Path, *, train: int = 27, other: int = 9) -> Path:
    """A packed set of three classes, each with words of its own; lengths from 3 to 40 words."""
    generator = np.random.default_rng(0)
    words = [sentence.split() for sentence in SENTENCES]
    for split, count in (("train", train), ("val", other), ("test", other)):
        samples = []
        for number in range(count):
            label = number % 3
            length = int(generator.integers(3, 40))
            own, all_of_them = words[label], [w for sentence in words for w in sentence]
            chosen = [str(generator.choice(own if i % 2 else all_of_them)) for i in range(length)]
            samples.append(Sample(f"{number}", " ".join(chosen).encode(), label))
        write_split(samples, ["a", "b", "c"], root, split=split, kind=TextModality())
    return root
