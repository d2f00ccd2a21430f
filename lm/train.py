"""Pre-training on text: ``fastlm train``."""

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoint, data
from .config import PRESETS, GPTConfig, read_json
from .fit import Batch, FitConfig, Loop, fit, prepare, settings
from .model import GPT
from .options import add_options, given, option
from .parallel import World, world
from .run import Record, Run
from .tokenizer import ByteTokenizer, load_tokenizer


@dataclass(frozen=True)
class TrainConfig(FitConfig):
    """How and on what a model is pre-trained."""

    data: str = option(
        data.STDLIB, "text, a file or a folder; a folder of tokens; or stdlib: Python's own sources"
    )
    preset: str = option("tiny", f"the model: {', '.join(PRESETS)}")
    n_layer: int | None = option(None, "blocks")
    n_head: int | None = option(None, "attention heads")
    n_embd: int | None = option(None, "width")
    block_size: int | None = option(None, "tokens a sequence")
    dropout: float | None = option(None, "probability")
    eval_sequences: int = option(96, "held-out sequences of an evaluation")

    def model_config(self, vocab_size: int) -> GPTConfig:
        """The model's shape."""
        changes = {
            name: getattr(self, name)
            for name in ("n_layer", "n_head", "n_embd", "block_size", "dropout")
            if getattr(self, name) is not None
        }
        return GPTConfig.preset(self.preset, vocab_size=vocab_size, **changes)


class TextTask:
    """The next token of a corpus.

    Args:
        corpus: The text.
        config: The run's settings.
        block_size: Tokens a sequence.
        world: This process, which takes its part of each step.
    """

    def __init__(self, corpus: data.Corpus, config: TrainConfig, block_size: int, world: World):
        self.corpus, self.config, self.T, self.world = corpus, config, block_size, world

    def batches(self, step: int) -> Iterable[Batch]:
        """Sequences drawn without replacement."""
        config, tokens = self.config, self.corpus.train
        begins = data.starts(len(tokens), self.T, config.seed, step, config.batch_size)
        return self._mine(tokens, begins, config.micro(self.world.size))

    def _mine(self, tokens: np.ndarray, begins: np.ndarray, micro: int) -> Iterable[Batch]:
        """This process's part of some sequences: every so many of them, or a slice of each."""
        rank, size = self.world.rank, self.world.size
        own = slice(None)
        if self.config.parallel == "context":
            own = slice(rank * self.T // size, (rank + 1) * self.T // size)
        else:
            begins = begins[rank::size]
        for i in range(0, len(begins), micro):
            ids, targets = data.batch(tokens, begins[i : i + micro], self.T)
            yield {"ids": ids[:, own], "targets": targets[:, own]}

    def count(self, batch: Batch) -> int:
        """Every target counts."""
        return batch["targets"].numel()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy in nats, summed."""
        return model(batch["ids"], batch["targets"], reduction="sum")[1]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Cross entropy of the same held-out sequences every time."""
        tokens = self.corpus.val
        begins = data.held_out_starts(len(tokens), self.T, self.config.eval_sequences)
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for batch in self._mine(tokens, begins, self.config.micro(self.world.size)):
            moved = {name: t.to(total.device) for name, t in batch.items()}
            total += self.loss(model, moved).double()
        loss = self.world.total(total).item() / (len(begins) * self.T)
        return {
            "val_loss": loss,
            "bits_per_byte": loss / math.log(2) / self.corpus.bytes_per_token,
        }

    def state(self) -> checkpoint.Facts:
        """Nothing: its batches are a function of the step."""
        return {}

    def restore(self, state: checkpoint.Facts) -> None:
        """Nothing to take back."""


def train(config: TrainConfig, out: Path, *, world: World, resume: bool = False) -> Record:
    """Pre-trains a model; its last figures.

    Args:
        config: Settings.
        out: The run folder.
        world: This process among the others.
        resume: Go on from the newest checkpoint in ``out``.

    Raises:
        ValueError: Settings, data or a folder that make no run; a checkpoint that is not whole.
        ArithmeticError: A loss was not finite.
    """
    config.check(world.size)
    found = checkpoint.steps(out)
    if found and not resume:
        raise ValueError(f"--out {out} holds a run at step {found[-1]}; --resume goes on with it")
    torch.manual_seed(config.seed)
    block_size = config.model_config(256).block_size
    corpus = data.load(config.data, block_size)
    if resume:
        folder, facts = checkpoint.newest(out)
        model = GPT.from_pretrained(folder, ops=config.ops)
        before = read_json(out / "run.json").get("data", {}).get("digest")
        if before != corpus.digest:
            raise ValueError(
                f"--data {config.data} must be what the run began with, {before}; "
                f"it is {corpus.digest}"
            )
    else:
        model = GPT(config.model_config(corpus.vocab_size), ops=config.ops)
    task = TextTask(corpus, config, block_size, world)
    loop = Loop(prepare(model, config, world), config, task, world)
    run = Run(out, config, {"data": {"name": corpus.name, "digest": corpus.digest}}, world)
    if resume:
        loop.restore(folder, facts)
    run.forget_after(loop.step)
    if world.main:
        tokenizer = ByteTokenizer() if corpus.folder is None else load_tokenizer(corpus.folder)
        tokenizer.save(out)
        print(
            f"{model.num_params():,} parameters, {config.ops} ops on {world.device}; "
            f"{len(corpus.train):,} tokens of {corpus.name} to train on, {len(corpus.val):,} "
            f"held out",
            flush=True,
        )
    return fit(loop, run, config.batch_size * block_size)


# --- command line -------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of ``fastlm train``."""
    parser.add_argument(
        "--out", type=Path, default=Path("runs/train"), help="the run folder (default runs/train)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    add_options(parser, TrainConfig)


def run(args: argparse.Namespace) -> int:
    """Runs ``fastlm train`` and gives its exit code."""
    config = settings(TrainConfig, args.out, given(args, TrainConfig), args.resume)
    with world(config.device) as here:
        train(config, args.out, world=here, resume=args.resume)
        if here.main:
            prompt = f'fastlm generate --checkpoint {args.out} --prompt "def "'
            print(f"wrote {args.out}; try: {prompt}")
    return 0
