"""Tokenizers: what they number, and that a checkpoint brings them back."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch

from attbalance_ext.grounding.data import Vocabulary
from attbalance_ext.grounding.data.tokenizers import (
    HuggingFaceTokenizer,
    Tokenizer,
    WordTokenizer,
    tokenizer_from_state,
)
from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.files import load_checkpoint, save_checkpoint

SENTENCES = ["the red one", "", "a zebra on the left of the red one", "red"]
WORDS = ["a", "left", "of", "on", "one", "red", "the"]


def save_wordpiece(folder: Path) -> Path:
    """A small BERT tokenizer, as a folder of pre-trained weights has it."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "##s"]
    fast = Fast(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer()
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=fast, **special).save_pretrained(folder)
    return folder


@pytest.fixture
def wordpiece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HuggingFaceTokenizer:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return HuggingFaceTokenizer.load(str(save_wordpiece(tmp_path / "tokenizer")))


def make(kind: str, tmp_path: Path) -> Tokenizer:
    if kind == "huggingface":
        return HuggingFaceTokenizer.load(str(save_wordpiece(tmp_path / "tokenizer")))
    return WordTokenizer(Vocabulary(WORDS), special_tokens=kind == "words between special tokens")


KINDS = ["words", "words between special tokens", "huggingface"]


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_padding(kind: str, tmp_path: Path) -> None:
    tokenizer = make(kind, tmp_path)
    for max_length in (3, 5, 20):
        ids, padding = tokenizer.encode(SENTENCES, max_length)
        assert ids.shape == padding.shape
        assert (ids.dtype, padding.dtype) == (torch.int64, torch.bool)
        assert ids.shape[1] == min(max_length, 9 if kind == "words" else 11)
        assert ids.min() >= 0
        assert ids.max() < len(tokenizer)
        assert not padding[:, 0].any()  # an empty sentence too has something to attend to
        assert not (~padding[:, 1:] & padding[:, :-1]).any()  # padding is at the end
    assert tokenizer.encode([], 5)[0].shape == (0, 1)
    alone, _ = tokenizer.encode(SENTENCES[3:], 20)
    together, padding = tokenizer.encode(SENTENCES, 20)
    assert together[3][~padding[3]].tolist() == alone[0].tolist()  # rows do not depend on each other


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_brings_it_back(kind: str, tmp_path: Path) -> None:
    tokenizer = make(kind, tmp_path)
    before = tokenizer.encode(SENTENCES, 6)
    save_checkpoint(tmp_path / "run" / "last.pt", {"tokenizer": tokenizer.state()})
    again = tokenizer_from_state(load_checkpoint(tmp_path / "run" / "last.pt")["tokenizer"])
    assert type(again) is type(tokenizer)
    assert len(again) == len(tokenizer)
    assert again.state() == tokenizer.state()
    for length in (6, 20, 3):
        for one, other in zip(again.encode(SENTENCES, length), tokenizer.encode(SENTENCES, length), strict=True):
            assert torch.equal(one, other)
    assert torch.equal(before[0], again.encode(SENTENCES, 6)[0])


def test_words() -> None:
    ids, padding = WordTokenizer(Vocabulary(["a", "b"])).encode(["b a b", "zebra", ""], 2)
    assert ids.tolist() == [[3, 2], [1, 0], [1, 0]]
    assert padding.tolist() == [[False, False], [False, True], [False, True]]


def test_special_tokens_survive_truncation() -> None:
    tokenizer = WordTokenizer(Vocabulary(["a", "b"]), special_tokens=True)
    ids, padding = tokenizer.encode(["a b a b", "", "zebra"], 4)
    assert ids.tolist() == [[4, 2, 3, 5], [4, 5, 0, 0], [4, 1, 5, 0]]
    assert padding.sum(1).tolist() == [0, 2, 1]
    assert len(tokenizer) == 6
    assert tokenizer.encode(["a b"], 2)[0].tolist() == [[4, 5]]
    with pytest.raises(UserError, match="max_length is 1; with special tokens it must be at least 2"):
        tokenizer.encode(["a"], 1)


def test_word_pieces(wordpiece: HuggingFaceTokenizer) -> None:
    ids, padding = wordpiece.encode(["The reds, one!", ""], 20)
    assert ids.tolist() == [[2, 10, 9, 11, 1, 8, 1, 3], [2, 3, 0, 0, 0, 0, 0, 0]]
    assert padding.sum(1).tolist() == [0, 6]
    ids, _ = wordpiece.encode(["the red one of the left"], 4)
    assert ids.tolist() == [[2, 10, 9, 3]]
    assert len(wordpiece) == 12
    with pytest.raises(UserError, match="max_length is 1; with special tokens it must be at least 2"):
        wordpiece.encode(["a"], 1)


def test_a_tokenizer_without_special_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, pre_tokenizers

    fast = Fast(models.WordLevel({"a": 3, "[UNK]": 7}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = HuggingFaceTokenizer(fast, 0)
    ids, padding = tokenizer.encode(["a b a", ""], 2)
    assert ids.tolist() == [[3, 7], [0, 0]]
    assert padding.tolist() == [[False, False], [False, True]]
    assert len(tokenizer) == 8  # numbers need not be without gaps


def test_what_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"tokenizer '.*none' cannot be loaded: "):
        HuggingFaceTokenizer.load(str(tmp_path / "none"))
    folder = save_wordpiece(tmp_path / "broken")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer '.*broken' cannot be loaded: "):
        HuggingFaceTokenizer.load(str(folder))


def test_a_revision_may_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    asked: list[Any] = []

    def offline(name: str, **options: Any) -> Any:
        asked.append((name, options["revision"]))
        raise OSError("not here")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", offline)
    for name in ("bert-base-uncased@main", "bert-base-uncased"):
        with pytest.raises(UserError, match="not here"):
            HuggingFaceTokenizer.load(name)
    assert asked == [("bert-base-uncased", "main"), ("bert-base-uncased", None)]


def test_code_beside_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    folder, proof = save_wordpiece(tmp_path / "evil"), tmp_path / "proof"
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(proof)!r})\nclass Evil: pass\n")
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}'
    )
    with pytest.raises(UserError, match="cannot be loaded"):
        HuggingFaceTokenizer.load(str(folder))
    assert not proof.exists()


@pytest.mark.parametrize("missing", ["transformers", "tokenizers"])
def test_without_the_package_the_error_says_what_to_install(
    missing: str, wordpiece: HuggingFaceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, original = wordpiece.state(), builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    load = {"transformers": lambda: HuggingFaceTokenizer.load("x"), "tokenizers": lambda: tokenizer_from_state(state)}
    with pytest.raises(UserError, match=r"pip install 'attbalance_ext\[transformers\]'"):
        load[missing]()


@pytest.mark.parametrize(
    "state",
    [{}, {"kind": "nope"}, {"kind": "words", "words": "abc", "special_tokens": False}, {"kind": "words"}],
)
def test_other_states_are_refused(state: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"no kind that this version knows \(words, huggingface\)"):
        tokenizer_from_state(state)


def test_a_damaged_state_is_refused() -> None:
    with pytest.raises(UserError, match="the tokenizer in the checkpoint cannot be read: "):
        tokenizer_from_state({"kind": "huggingface", "tokenizer": "{", "pad": 0})
