"""Fill-in-the-middle: putting the parts back gives the documents, the shares are the config's, the draw is the sample's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from configs import schema
from pretrain.data.fim import FillInTheMiddle
from pretrain.data.streams import NO_MASKS, build_streams, make_fim, open_train
from pretrain.data.tokenizer import TextTokenizer, load_tokenizer, section_for
from pretrain.preflight.data import check_data

PRE, MID, SUF, EOD = 900, 901, 902, 0


def fim(rate: float, spm_rate: float) -> FillInTheMiddle:
    return FillInTheMiddle(rate, spm_rate, PRE, MID, SUF, EOD, seed=3)


def transformed(made: FillInTheMiddle, tokens: np.ndarray, sample: int) -> np.ndarray:
    """The tokens of a sample, with what has grown beyond its length cut off."""
    return made.transform(tokens, made.random_of(sample))[: len(tokens)]


def restored(document: list[int]) -> tuple[list[int], str]:
    """(the document as it was, its form: plain, psm or spm) from the format of the paper."""
    if PRE not in document:
        return document, "plain"
    suf, mid = document.index(SUF), document.index(MID)
    assert document[0] == PRE and suf < mid
    if suf == 1:
        # The middle follows the prefix without a mark.
        return [*document[mid + 1 :], *document[2:mid]], "spm"
    return [*document[1:suf], *document[mid + 1 :], *document[suf + 1 : mid]], "psm"


def documents_of(tokens: np.ndarray) -> list[list[int]]:
    return [part[part != EOD].tolist() for part in np.split(tokens, np.flatnonzero(tokens == EOD) + 1)]


@pytest.mark.parametrize("spm_rate", [0.0, 0.3])
def test_parts_put_back_are_the_documents(spm_rate: float) -> None:
    random, forms = np.random.default_rng(1), []
    for sample in range(300):
        lengths = random.integers(0, 40, 8)
        tokens = np.concatenate([np.append(random.integers(1, 800, length), EOD) for length in lengths])
        got = transformed(fim(0.5, spm_rate), tokens, sample)
        assert len(got) == len(tokens)
        assert np.array_equal(got, transformed(fim(0.5, spm_rate), tokens, sample)), "the same at each reading"
        # The last documents of a sample are cut off where others have grown.
        whole = documents_of(got)[:-1][:4]
        for document, want in zip(whole, documents_of(tokens), strict=False):
            text, form = restored(document)
            assert text == want
            forms += [form] if len(want) >= 3 else []
            assert len(want) >= 3 or form == "plain"
    share = 1 - forms.count("plain") / len(forms)
    assert abs(share - 0.5) < 0.05
    # An empty prefix makes both forms alike: 2 / (n + 1) of the others.
    assert abs(forms.count("spm") / (share * len(forms)) - spm_rate) < (0.12 if spm_rate == 0 else 0.1)


def test_only_training_data_are_rearranged_and_each_sample_alike(config: schema.Config, folder: Path) -> None:
    tokenizer = load_tokenizer(section_for(str(folder / "tok.model")))
    config.data.fim.prefix, config.data.fim.middle, config.data.fim.suffix = (tokenizer.token(i) for i in (300, 301, 302))
    plain = build_streams(config, tokenizer, is_builder=True, barrier=lambda: None)
    config.data.fim.rate = 1.0
    assert not check_data(config)
    streams = build_streams(config, tokenizer, is_builder=True, barrier=lambda: None)
    made = make_fim(config, tokenizer)
    assert made and (made.prefix_id, made.middle_id, made.suffix_id) == (300, 301, 302)
    raw = open_train(config, NO_MASKS)
    for sample in (0, 5, 17):
        tokens = streams.train[sample].tokens
        assert np.array_equal(tokens, transformed(made, raw[sample].tokens, sample))
        assert not np.array_equal(tokens, raw[sample].tokens)
    assert np.array_equal(streams.valid["val_loss"][0][3].tokens, plain.valid["val_loss"][0][3].tokens)


def test_tokens_that_the_tokenizer_lacks(config: schema.Config, tokenizer: TextTokenizer) -> None:
    config.data.fim.rate, config.data.fim.suffix = 0.5, tokenizer.token(300)
    problems = {problem.path: problem.rule for problem in check_data(config)}
    assert set(problems) == {"data.fim.prefix", "data.fim.middle"} and "must have this token" in problems["data.fim.prefix"]
