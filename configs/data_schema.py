"""The `data` section: tokenizer, blends, validation sets, masks.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional

from configs.fields import key


@dataclass
class TokenizerConfig:
    kind: str = key("sentencepiece", "File format of the tokenizer.", choices=("sentencepiece", "huggingface"))
    path: Optional[str] = key(None, "File of the tokenizer: tokenizer.model (sentencepiece) or tokenizer.json (huggingface).")
    eod: Optional[str] = key(
        None,
        "Text of the end-of-document token. null: the first of its usual names that the tokenizer has; <|endoftext|> comes first.",
    )


@dataclass
class BlendPart:
    path: str = key("", "Prefix of the files PREFIX.bin and PREFIX.idx.")
    weight: float = key(1.0, "Share of the samples from this part, relative to the other parts.", above=0)


@dataclass
class Fim:
    """Fill-in-the-middle on the training data. The three names are of tokens that the tokenizer has."""

    rate: float = key(0.0, "Share of the documents whose middle is moved behind their suffix. 0: off.", low=0, high=1)
    spm_rate: float = key(0.5, "Share of those in which the suffix comes first.", low=0, high=1)
    prefix: str = key("<|fim_prefix|>", "Token before the prefix.")
    middle: str = key("<|fim_middle|>", "Token before the middle.")
    suffix: str = key("<|fim_suffix|>", "Token before the suffix.")


@dataclass
class ValidSet:
    name: str = key("", "Name of the set: letters, digits, dots, - and _. Its curve is val_loss/NAME.")
    parts: List[BlendPart] = key(factory=list, doc="Parts of the set, each {path, weight}.")
    batches: Optional[int] = key(None, "Global batches of one validation of this set. null: run.eval_batches.", low=1)


@dataclass
class DataPhase:
    from_tokens: int = key(0, "Tokens of the data, counted from the first one, at which the phase begins.", low=1)
    train: List[BlendPart] = key(factory=list, doc="Parts of the training data in this phase, each {path, weight}.")


@dataclass
class Data:
    tokenizer: TokenizerConfig = key(factory=TokenizerConfig)
    train: List[BlendPart] = key(factory=list, doc="Parts of the training data, each {path, weight}.")
    valid: List[BlendPart] = key(
        factory=list, doc="Parts of the validation data, each {path, weight}. Empty: valid_fraction of each training part."
    )
    valid_fraction: float = key(
        0.01,
        "With an empty valid: share of documents at the end of each training part that is held out for validation.",
        low=0,
        high=0.5,
    )
    valid_sets: List[ValidSet] = key(
        factory=list, doc="Further validation sets, each {name, parts, batches} with a curve of its own."
    )
    phases: List[DataPhase] = key(
        factory=list,
        doc="Later blends, each {from_tokens, train}; data.train is the first. A part that goes on continues where it was.",
    )
    max_epochs: float = key(
        4.0,
        "`check` warns when a source is repeated more often than this in the run. Four is the limit of arXiv 2305.16264.",
        above=0,
    )
    packing: str = key(
        "concatenate",
        "How documents fill sequences. concatenate: end to end, cut at each sequence's end. best_fit: no document that fits is cut.",
        choices=("concatenate", "best_fit"),
    )
    fim: Fim = key(factory=Fim)
    document_mask: bool = key(False, "A token attends only to tokens of its own document.")
    mask_eod_loss: bool = key(
        False,
        "Leave out the loss of positions whose input is the end-of-document token. Router losses count all tokens.",
    )
    cache_dir: Optional[str] = key(None, "Folder for cached sample indices. null: beside the data.")
