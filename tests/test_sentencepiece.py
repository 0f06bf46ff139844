"""Tokenizers that are published as a sentencepiece model only, such as T5's in FLUX.1's time."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from transformers import T5Tokenizer

from dive_fast.errors import ModelError
from dive_fast.models.text import pipeline_text
from dive_fast.models.text.pipeline_text import _load_tokenizer

SENTENCES = ["a photo of a cat.", "a photo of a dog.", "a bird"]


def test_a_model_alone_is_read(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 10), model_writer=content, vocab_size=40,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "spiece.model").write_bytes(content.getvalue())
    tokenizer = _load_tokenizer(T5Tokenizer, tmp_path)
    own = sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())
    for sentence in [*SENTENCES, "a cat of a bird"]:
        assert tokenizer(sentence).input_ids == [*own.encode(sentence), 1]


def test_what_it_needs_is_told(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "spiece.model").write_bytes(b"x")
    for there, message in (
        (("sentencepiece",), "needs protobuf, which is not installed: pip install 'dive_fast.text"),
        ((), "needs sentencepiece and protobuf, which are not installed"),
    ):
        monkeypatch.setattr(pipeline_text, "_is_there", lambda name, there=there: name in there)
        with pytest.raises(ModelError, match=message):
            _load_tokenizer(T5Tokenizer, tmp_path)
    monkeypatch.setattr(pipeline_text, "_is_there", lambda name: True)
    with pytest.raises(ModelError, match="cannot be loaded as T5Tokenizer"):
        _load_tokenizer(T5Tokenizer, tmp_path)


def test_what_is_there(monkeypatch) -> None:
    assert pipeline_text._is_there("torch") and not pipeline_text._is_there("no_such_module")
    assert not pipeline_text._is_there("no_such_parent.module")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # as of a broken installation
    assert not pipeline_text._is_there("sentencepiece")
