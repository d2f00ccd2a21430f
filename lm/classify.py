"""A classifier of texts: a GPT or an encoder, pooled, and one linear over the classes.

With the preset ``encoder-base`` it is the Transformer of 2017 as Keras's text classification
example has it: post-LN block, mean over the tokens, dropout, softmax. On a causal model the last
token, which alone has seen the whole text, stands for it.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .chat import read_jsonl, split_of, text_of
from .config import GPTConfig, read_json
from .model import GPT
from .rows import packed
from .tokenizer import load_tokenizer
from .words import HashedWords, words

Pooling = Literal["mean", "last"]
_SETTINGS, _HEAD = "classifier.json", "classifier.safetensors"
_WORDS, _PARTS = "words", "words and parts"  # tokenizers that need no file


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of a text.

    Attributes:
        label: The likeliest class.
        probability: Of that class.
        probabilities: Of every class.
    """

    label: str
    probability: float
    probabilities: dict[str, float]


class Classifier(nn.Module):
    """A model that gives each of several classes a score.

    Args:
        body: What reads the text.
        labels: Names of the classes.
        tokenizer: Turns a text into the body's tokens.
        pooling: "mean" of all tokens or the "last"; None: the last of a causal body, else the mean.

    Raises:
        ValueError: Fewer than two classes, or one twice.
    """

    def __init__(
        self,
        body: GPT,
        labels: Sequence[str],
        tokenizer: Any,
        pooling: Pooling | None = None,
    ):
        super().__init__()
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise ValueError(f"Classifier: labels must be two or more, all different; got {labels}")
        self.body, self.labels, self.tokenizer = body, tuple(labels), tokenizer
        self.pooling: Pooling = pooling or ("last" if body.config.causal else "mean")
        self.score = nn.Linear(body.config.n_embd, len(labels))
        nn.init.normal_(self.score.weight, std=0.02)
        nn.init.zeros_(self.score.bias)
        self.to(body.wte.weight.device, body.wte.weight.dtype)

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        *,
        cu_seqlens: Tensor,
        reduction: str = "mean",
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits of packed texts, or their loss: a ``GPT``'s signature.

        Args:
            ids: (total,) int64 tokens.
            targets: (texts,) int64 classes.
            cu_seqlens: (texts + 1,) int32: where texts begin and end.
            reduction: Of the loss: "mean", "sum" or "none".

        Returns:
            (logits, None), logits (texts, classes); or (None, loss) where there are targets.
        """
        x = self.body.hidden(ids, cu_seqlens=cu_seqlens)
        if self.pooling == "last":
            x = x[cu_seqlens[1:].long() - 1]
        else:
            lengths = cu_seqlens.diff().long()
            x = torch.segment_reduce(x.float(), "mean", lengths=lengths).to(x.dtype)
        logits = self.score(F.dropout(x, self.body.config.dropout, self.training))
        if targets is None:
            return logits, None
        return None, F.cross_entropy(logits, targets, reduction=reduction)

    @torch.no_grad()
    def predict(self, texts: Sequence[str], batch_size: int = 64) -> list[Prediction]:
        """The classes of texts, with probabilities.

        Raises:
            ValueError: A text without any token.
        """
        training = self.training
        self.eval()
        found = []
        for start in range(0, len(texts), batch_size):
            rows = [self.tokens(text) for text in texts[start : start + batch_size]]
            ids, cu_seqlens = packed(rows)
            device = self.score.weight.device
            logits, _ = self(ids.to(device), cu_seqlens=cu_seqlens.to(device))
            for row in logits.float().softmax(-1).tolist():
                by_label = dict(zip(self.labels, row, strict=True))
                label = max(by_label, key=by_label.__getitem__)
                found.append(Prediction(label, by_label[label], by_label))
        self.train(training)
        return found

    def tokens(self, text: str) -> list[int]:
        """A text's tokens, its beginning where it is longer than ``block_size``."""
        ids = self.tokenizer.encode(text)[: self.body.config.block_size]
        if not ids:
            raise ValueError(f"Classifier: texts must have a word; got {text!r}")
        return ids

    # What the training loop asks of a model.

    @property
    def config(self) -> GPTConfig:
        """The body's."""
        return self.body.config

    @property
    def h(self) -> nn.ModuleList:
        """The body's blocks."""
        return self.body.h

    @property
    def checkpoint_activations(self) -> bool:
        """The body's."""
        return self.body.checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, on: bool) -> None:
        self.body.checkpoint_activations = on

    def flops_per_token(self, T: int) -> int:
        """The body's, without a head over the vocabulary."""
        config = self.body.config
        return self.body.flops_per_token(T) - 6 * config.vocab_size * config.n_embd

    # Folders.

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the body as any model, and beside it the head and the names of the classes."""
        from safetensors.torch import save_file

        folder = Path(folder)
        self.body.save_pretrained(folder)
        head = {name: t.detach().cpu().contiguous() for name, t in self.score.state_dict().items()}
        save_file(head, folder / _HEAD)
        settings = {
            "labels": list(self.labels),
            "pooling": self.pooling,
            "tokenizer": "folder",
        }
        if isinstance(self.tokenizer, HashedWords):
            settings["tokenizer"] = _PARTS if self.tokenizer.parts else _WORDS
        else:
            self.tokenizer.save(folder)
        (folder / _SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "Classifier":
        """The classifier of a folder.

        Raises:
            ValueError: Files that are missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        if not (folder / _SETTINGS).is_file():
            raise ValueError(f"{folder} must hold a classifier; it has no {_SETTINGS}")
        settings = read_json(folder / _SETTINGS)
        body = GPT.from_pretrained(folder)
        tokenizer = tokenizer_of(folder, body.config.vocab_size)
        model = cls(body, settings["labels"], tokenizer, settings["pooling"])
        try:
            model.score.load_state_dict(load_file(folder / _HEAD))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ValueError(f"{folder / _HEAD} must hold the head; {error}") from None
        return model.eval()


def tokenizer_of(folder: Path, vocab_size: int) -> Any:
    """The tokenizer of a folder, with a classifier in it or not.

    Raises:
        ValueError: Files that are missing or damaged.
    """
    if (folder / _SETTINGS).is_file():
        named = read_json(folder / _SETTINGS).get("tokenizer")
        if named in (_WORDS, _PARTS):
            return HashedWords(vocab_size, parts=named == _PARTS)
    return load_tokenizer(folder)


# --- data ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelled:
    """A text and its class.

    Attributes:
        text: Not empty.
        label: The name of its class.
        split: "train", "validation" or, where the file does not say, None.
    """

    text: str
    label: str
    split: str | None = None


def read_labelled(path: str | Path) -> list[Labelled]:
    """The lines ``{"text": "...", "label": "..."}`` of a file.

    Raises:
        ValueError: A line that is none, with its place, or a single class.
    """
    found = []
    for place, line in read_jsonl(path):
        text, label = text_of(place, line, "text"), text_of(place, line, "label")
        if not words(text):
            raise ValueError(f"{place}: text must have a word; got {text!r}")
        found.append(Labelled(text, label, split_of(place, line)))
    labels = sorted({e.label for e in found})
    if len(labels) < 2:
        raise ValueError(f"data: {path} must have two labels or more; all are {labels[0]!r}")
    return found


# --- scores -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassScore:
    """How a classifier does on one class.

    Attributes:
        precision: The share of what it calls so that is so; 0 where it calls nothing so.
        recall: The share of what is so that it calls so.
        f1: Their harmonic mean.
        count: Texts of the class.
    """

    precision: float
    recall: float
    f1: float
    count: int


def confusion(wanted: Sequence[str], got: Sequence[str], labels: Sequence[str]) -> list[list[int]]:
    """How many texts of each class (rows) were called what (columns)."""
    pairs = Counter(zip(wanted, got, strict=True))
    return [[pairs[row, column] for column in labels] for row in labels]


def class_scores(matrix: Sequence[Sequence[int]], labels: Sequence[str]) -> dict[str, ClassScore]:
    """Precision, recall and F1 of each class."""
    scores = {}
    for i, label in enumerate(labels):
        right, count = matrix[i][i], sum(matrix[i])
        called = sum(row[i] for row in matrix)
        f1 = 2 * right / (called + count) if called + count else 0.0
        scores[label] = ClassScore(right / max(1, called), right / max(1, count), f1, count)
    return scores


def accuracy(wanted: Sequence[str], got: Sequence[str]) -> float:
    """The share that is right."""
    return sum(a == b for a, b in zip(wanted, got, strict=True)) / len(wanted)


def bag_of_words(
    train: Sequence[Labelled],
    texts: Sequence[str],
    features: int = 2**16,
    epochs: int = 10,
    *,
    parts: bool = False,
) -> list[str]:
    """What a linear classifier over counts of hashed words, learned from ``train``, calls texts.

    The baseline: softmax regression on the mean of one vector a word, and with ``parts`` a part of
    a word, which sees no order.
    """
    labels = sorted({e.label for e in train})
    tokenizer = HashedWords(features, parts=parts)
    rows = [tokenizer.encode(e.text) for e in train]
    targets = torch.tensor([labels.index(e.label) for e in train])
    generator = torch.Generator().manual_seed(0)
    model = nn.EmbeddingBag(features, len(labels), mode="mean", sparse=True)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    for _ in range(epochs):
        for chosen in torch.randperm(len(rows), generator=generator).split(64):
            ids, ends = packed([rows[i] for i in chosen])
            loss = F.cross_entropy(model(ids, ends[:-1].long()), targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    ids, ends = packed([tokenizer.encode(text) for text in texts])
    with torch.no_grad():
        return [labels[i] for i in model(ids, ends[:-1].long()).argmax(-1).tolist()]
