"""Adapting a model to prompts and answers, or training a classifier: ``fastlm finetune``."""

import argparse
import copy
import dataclasses
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from . import checkpoint
from .atomic import sha256
from .byte_pairs import BytePairTokenizer, learn_merges
from .chat import Example, pieces, read_examples, tokens
from .classify import Classifier, Labelled, read_labelled, tokenizer_of
from .config import PRESETS, GPTConfig, read_json
from .evaluate import load_answers, score_answers, score_classes
from .fit import Batch, FitConfig, Loop, fit, prepare, settings
from .lora import TARGETS, adapters, apply_lora, merge_lora, save_lora
from .model import GPT
from .options import add_options, given, option
from .parallel import World, world
from .rows import Row, RowsTask, packed_rows, padded_rows
from .run import Record, Run, draw
from .tokenizer import ByteTokenizer
from .words import HashedWords

_SHAPE = ("n_layer", "n_head", "n_embd", "n_inner", "block_size", "vocab_size")
Line = TypeVar("Line", Example, Labelled)


@dataclass(frozen=True)
class FinetuneConfig(FitConfig):
    """How and on what a model is fine-tuned."""

    checkpoint: str = option("tiny", f"a model's folder, or a new model: {', '.join(PRESETS)}")
    data: str = option("", "JSONL of prompts and answers, of messages, or of texts and labels")
    task: Literal["lm", "classify"] = option("lm", "write answers, or tell classes apart")
    validation: float = option(0.1, "share of the lines to hold out, where they do not say")
    score: int = option(200, "held-out prompts to answer in the end; 0: none")
    batch_size: int = option(32, "examples a step, over all processes and micro-batches")
    lora_rank: int = option(0, "rank of adapters; 0: train every weight")
    lora_alpha: float | None = option(None, "adapters count alpha / rank (default twice the rank)")
    lora_dropout: float = option(0.0, "probability, of the adapters' input")
    lora_targets: str = option(",".join(TARGETS), "linears to adapt")
    merge: bool = option(True, "save one model, adapters taken in; without, the adapters alone")
    pooling: Literal["mean", "last"] | None = option(
        None, "a text is the mean of its tokens or the last (default: last of a causal model)"
    )
    n_layer: int | None = option(None, "blocks of a new model")
    n_head: int | None = option(None, "attention heads of a new model")
    n_embd: int | None = option(None, "width of a new model")
    n_inner: int | None = option(None, "feed-forward width of a new model")
    block_size: int | None = option(None, "most tokens a sequence of a new model")
    vocab_size: int | None = option(
        None,
        "tokens of a new model: above 256, byte pairs learned from the data (default 256, bytes); "
        "of a new encoder, numbers that words and their parts are hashed to (default 8192)",
    )
    dropout: float | None = option(None, "probability")
    token_dropout: float = option(0.0, "most of a text's tokens to leave out, of a classifier's")

    def check(self, world_size: int) -> None:
        """Raises ValueError where the numbers make no run."""
        super().check(world_size)
        if not self.data:
            raise ValueError("--data must be a JSONL file")
        if not 0.0 < self.validation < 1.0:
            raise ValueError(f"--validation must be between 0 and 1; got {self.validation}")
        for name in ("score", "lora_rank"):
            if getattr(self, name) < 0:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must be 0 or more; got {getattr(self, name)}")
        if not 0.0 <= self.token_dropout < 1.0:
            raise ValueError(f"--token-dropout must be in [0, 1); got {self.token_dropout}")
        if self.task == "lm" and self.token_dropout:
            raise ValueError("--token-dropout must be 0 for --task lm, in which each token counts")
        if self.task == "classify" and not self.merge:
            raise ValueError("--no-merge must not be given for --task classify, whose head is new")
        if self.lora_rank and not self.merge and self.checkpoint in PRESETS:
            raise ValueError(
                "--checkpoint must be a folder with --no-merge; adapters need it later"
            )
        if self.parallel == "context":
            raise ValueError("--parallel must be ddp or fsdp to fine-tune; got context")


def finetune(config: FinetuneConfig, out: Path, *, world: World, resume: bool = False) -> Record:
    """Fine-tunes a model; its last figures, ``best_val_loss`` among them.

    ``out`` gets the weights of the lowest held-out loss, whenever there is a lower one.

    Args:
        config: Settings.
        out: The folder.
        world: This process among the others.
        resume: Go on from the newest checkpoint in ``out``.

    Raises:
        ValueError: Settings, data or a folder that make no run.
        ArithmeticError: A loss was not finite.
    """
    config.check(world.size)
    saved = ("model.safetensors", "adapter.safetensors")
    if not resume and (checkpoint.steps(out) or any((out / name).exists() for name in saved)):
        raise ValueError(
            f"--out {out} holds a run already; --resume goes on with it, or give another folder"
        )
    torch.manual_seed(config.seed)
    job = (_answers if config.task == "lm" else _classes)(config)
    digest = sha256(Path(config.data))
    if resume:
        folder, facts = checkpoint.newest(out)
        if read_json(out / "run.json")["data"]["digest"] != digest:
            raise ValueError(f"--data {config.data} must be what the run began with; it changed")
        checkpoint.load_parameters(job.model, folder)
    task = RowsTask(
        job.train, job.held_out, job.collate, config, world, _saver(job, config, out, world),
        config.token_dropout,
    )  # fmt: skip
    model = prepare(job.model, config, world)
    loop = Loop(model, config, task, world, checkpoint.save_parameters)
    run = TaskRun(out, config, {"data": {"name": config.data, "digest": digest}}, world)
    if resume:
        loop.restore(folder, facts)
    run.forget_after(loop.step)
    tokens_a_row = sum(len(row.ids) for row in job.train) / len(job.train)
    if world.main:
        trained = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
        print(
            f"{trained:,} parameters to train, {config.ops} ops on {world.device}; "
            f"{len(job.train):,} examples of {tokens_a_row:.0f} tokens, {len(job.held_out):,} "
            "held out",
            flush=True,
        )
    last = fit(loop, run, round(config.batch_size * tokens_a_row))
    if world.main:
        job.score(out)
    world.wait()
    return {**last, "best_val_loss": task.best_loss}


def _saver(
    job: "Job", config: FinetuneConfig, out: Path, world: World
) -> Callable[[torch.nn.Module], None]:
    """What writes the best weights, from every process's share of them."""
    shared = config.parallel == "fsdp" and world.size > 1
    plain = copy.deepcopy(job.model) if shared else job.model

    def save(model: torch.nn.Module) -> None:
        if shared:
            weights = checkpoint.whole_weights(model)
            if world.main:
                plain.load_state_dict(weights)
        if world.main:
            job.save(out, plain)

    return save


class TaskRun(Run):
    """The folder of a run that has its best weights at the top, not its newest."""

    def save(self, loop: Loop) -> None:
        """Writes a checkpoint, and draws the picture."""
        loop.save(self.folder)
        if self.world.main:
            checkpoint.remove_old(self.folder, self.config.keep)
            draw(self.folder)
        self.world.wait()


@dataclass(frozen=True)
class Job:
    """What one of the two tasks gives the loop."""

    model: Any
    train: Sequence[Row]
    held_out: Sequence[Row]
    collate: Callable[[Sequence[Row]], Batch]
    save: Callable[[Path, Any], None]
    score: Callable[[Path], object]


def _answers(config: FinetuneConfig) -> Job:
    """A language model and conversations."""
    train, held_out = split(read_examples(config.data), config)
    model, tokenizer = base_model(
        config, lambda: (text for e in train for text, _ in pieces(e.messages))
    )
    if config.lora_rank:
        _adapt(model, config)

    def row(example: Example) -> Row:
        return Row(*tokens(example, tokenizer, model.config.block_size))

    def save(folder: Path, trained: GPT) -> None:
        if adapters(trained) and not config.merge:
            save_lora(trained, folder)
            return
        plain = merge_lora(copy.deepcopy(trained)) if adapters(trained) else trained
        plain.save_pretrained(folder)
        tokenizer.save(folder)

    def score(folder: Path) -> None:
        if config.score:
            alone = config.lora_rank and not config.merge
            best = load_answers(config.checkpoint, folder) if alone else load_answers(folder)
            score_answers(*best, train, held_out[: config.score], folder)

    return Job(model, [*map(row, train)], [*map(row, held_out)], padded_rows, save, score)


def _classes(config: FinetuneConfig) -> Job:
    """A classifier and labelled texts."""
    examples = read_labelled(config.data)
    train, held_out = split(examples, config)
    body, tokenizer = base_model(config, lambda: (e.text for e in train))
    if config.lora_rank:
        _adapt(body, config)
    model = Classifier(body, sorted({e.label for e in examples}), tokenizer, config.pooling)
    number = {label: i for i, label in enumerate(model.labels)}

    def row(example: Labelled) -> Row:
        return Row(model.tokens(example.text), [number[example.label]])

    def save(folder: Path, trained: Classifier) -> None:
        plain = trained
        if adapters(trained):
            plain = copy.deepcopy(trained)
            merge_lora(plain.body)
        plain.save_pretrained(folder)

    def score(folder: Path) -> None:
        score_classes(Classifier.load(folder), train, held_out, folder)

    return Job(model, [*map(row, train)], [*map(row, held_out)], packed_rows, save, score)


def _adapt(model: GPT, config: FinetuneConfig) -> None:
    """Gives a model the adapters of the settings."""
    targets = config.lora_targets.split(",")
    apply_lora(model, config.lora_rank, config.lora_alpha, targets, config.lora_dropout)


def base_model(config: FinetuneConfig, texts: Callable[[], Iterable[str]]) -> tuple[GPT, Any]:
    """The model to start from and its tokenizer.

    Args:
        config: The run's settings.
        texts: What the model will read, for a vocabulary of its own.

    Raises:
        ValueError: No such folder or preset, or flags that a folder's model cannot follow.
    """
    changes = {n: getattr(config, n) for n in _SHAPE if getattr(config, n) is not None}
    if config.checkpoint in PRESETS:
        dropout = {} if config.dropout is None else {"dropout": config.dropout}
        return _new_model(config, {**changes, **dropout}, texts)
    folder = Path(config.checkpoint)
    if not folder.is_dir():
        raise ValueError(
            f"--checkpoint must be a folder or one of {', '.join(PRESETS)}; got {folder}"
        )
    if changes:
        flag = "--" + next(iter(changes)).replace("_", "-")
        raise ValueError(f"{flag} is of new models; {folder} has its own")
    model = GPT.from_pretrained(folder, config.ops)
    if config.dropout is not None:
        wetter = GPT(dataclasses.replace(model.config, dropout=config.dropout), config.ops)
        wetter.load_state_dict(model.state_dict())
        model = wetter
    return model, tokenizer_of(folder, model.config.vocab_size)


def _new_model(
    config: FinetuneConfig, changes: dict[str, Any], texts: Callable[[], Iterable[str]]
) -> tuple[GPT, Any]:
    """A preset with fresh weights: an encoder reads hashed words, others bytes or byte pairs."""
    tokenizer: Any
    if not PRESETS[config.checkpoint].get("causal", True):
        if config.task == "lm":
            raise ValueError(f"--checkpoint must be causal for --task lm; got {config.checkpoint}")
        tokenizer = HashedWords(changes.get("vocab_size", 8192), parts=True)
    elif changes.get("vocab_size", 256) > 256:
        tokenizer = BytePairTokenizer(learn_merges(texts(), changes["vocab_size"] - 256))
    else:
        tokenizer = ByteTokenizer()
    shape = GPTConfig.preset(config.checkpoint, **{**changes, "vocab_size": tokenizer.vocab_size})
    return GPT(shape, config.ops), tokenizer


def split(examples: Sequence[Line], config: FinetuneConfig) -> tuple[list[Line], list[Line]]:
    """Examples to train on and to hold out: as the lines say, else a share drawn by the seed.

    Raises:
        ValueError: Nothing is left on one side.
    """
    if any(e.split for e in examples):
        train = [e for e in examples if e.split != "validation"]
        held_out = [e for e in examples if e.split == "validation"]
    else:
        mixed = list(examples)
        random.Random(config.seed).shuffle(mixed)
        cut = max(1, round(len(mixed) * config.validation))
        train, held_out = mixed[cut:], mixed[:cut]
    for part, name in ((train, "train on"), (held_out, "hold out")):
        if not part:
            raise ValueError(
                f"data: {config.data} must hold a line to {name}; got {len(examples)} lines in all"
            )
    return train, held_out


# --- command line -------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of ``fastlm finetune``."""
    parser.add_argument(
        "--out", type=Path, default=Path("runs/finetune"), help="the folder (runs/finetune)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    add_options(parser, FinetuneConfig)


def run(args: argparse.Namespace) -> int:
    """Runs ``fastlm finetune`` and gives its exit code."""
    config = settings(FinetuneConfig, args.out, given(args, FinetuneConfig), args.resume)
    with world(config.device) as here:
        finetune(config, args.out, world=here, resume=args.resume)
        if here.main:
            print(f"wrote {args.out}")
    return 0
