"""Continuations of prompts, whole or as they grow; and ``fastlm generate``."""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .growth import Growth, Prompts, Request, must
from .model import GPT
from .stops import StopText
from .tokenizer import Tokenizer, load_tokenizer


def generate(
    model: GPT, ids: Prompts, max_new_tokens: int | None = None, **options
) -> list[Tensor]:
    """Continues each prompt.

    Args:
        model: A causal one.
        ids: (B, T) tokens, or one prompt, or a list of prompts of any lengths.
        max_new_tokens: Most tokens that a prompt grows by.
        options: The rest of ``Request``:
            max_length: In place of ``max_new_tokens``: most tokens of prompt and new ones together.
            temperature, top_k, top_p, min_p, repetition_penalty: See ``Sampling``.
            num_return_sequences: Continuations of each prompt, which is computed once.
            stop: A string or several; a row ends with the token that completes one in new text.
            tokenizer: Reads the text for ``stop``.
            eos_token_id: A token or several; a row ends with the first.
            seed: A prompt's text depends on it and on no other prompt; None: a new one.
            use_cache: False computes everything again for each token.
            slide: A row longer than ``block_size`` goes on with the last half block as its
                prompt; otherwise too long ones are refused.
            speculative: Tokens to draft a step out of the row's own past. Output is the same, as
                far as logits of several tokens at once round as those of one.

    Returns:
        One int64 tensor a row, prompt included: prompt 0's continuations, then prompt 1's.

    Raises:
        ValueError: An argument outside the above.
    """
    growth = Growth(model, ids, Request(max_new_tokens, **options))
    for _ in growth:
        pass
    return [torch.tensor(row) for row in growth.rows()]


def stream(model: GPT, ids: Prompts, max_new_tokens: int | None = None, **options) -> Iterator[int]:
    """The new tokens of one prompt, each as soon as it is drawn. Arguments as ``generate``."""
    growth = Growth(model, ids, Request(max_new_tokens, **options))
    if len(growth.limits) != 1:
        raise must("ids", "be one prompt, continued once, to stream", len(growth.limits))
    for (tokens,) in growth:
        yield from tokens


# --- fastlm generate ----------------------------------------------------------------------------

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SMALL = 2**24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of ``fastlm generate``."""
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        default=Path("runs/train"),
        metavar="DIR",
        help="a run folder, a Hugging Face folder, or a .gguf file (default runs/train)",
    )
    add(
        "--prompt",
        default="\n",
        metavar="TEXT",
        help="what to continue; - reads standard input (default: a new line)",
    )
    add("--tokenizer", metavar="DIR", help="in place of the checkpoint's; 'bytes' for bytes")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="most tokens to add (default 200)"
    )
    length.add_argument(
        "--max-length", type=int, metavar="N", help="most tokens of prompt and text together"
    )
    add("--num-samples", type=int, default=1, metavar="N", help="texts to write (default 1)")
    add("--seed", type=int, metavar="N", help="the same text again (default: a new one each time)")
    add(
        "--temperature",
        type=float,
        default=0.8,
        metavar="X",
        help="below 1 likelier tokens, 0 always the likeliest (default 0.8)",
    )
    add(
        "--top-k",
        type=int,
        default=0,
        metavar="N",
        help="only the N likeliest tokens (default all)",
    )
    add(
        "--top-p",
        type=float,
        default=0.9,
        metavar="P",
        help="only the likeliest tokens that together reach P (default 0.9)",
    )
    add(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="only tokens at least P times as likely as the likeliest (default 0)",
    )
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1 avoids tokens that were there before (default 1)",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be repeated; \\n is a new line",
    )
    add(
        "--no-slide",
        action="store_true",
        help="refuse a text longer than the model's block, in place of going on with its end",
    )
    add(
        "--speculative",
        type=int,
        default=0,
        metavar="N",
        help="draft N tokens a step from the text so far: the same text, sooner where it repeats",
    )
    add("--no-cache", action="store_true", help="compute everything again for each token")
    add("--ops", choices=("fused", "eager"), default="fused", help="default fused")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--dtype", choices=tuple(_DTYPES), help="of the weights (default: as stored)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Runs ``fastlm generate`` and gives its exit code."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = GPT.from_pretrained(
        args.checkpoint, args.ops, device=device, dtype=_DTYPES.get(args.dtype)
    )
    if device == "cpu" and model.num_params() < _SMALL:
        torch.set_num_threads(1)  # a step is too short to share
    tokenizer = load_tokenizer(args.tokenizer or args.checkpoint)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise must("tokenizer", f"have at most {model.config.vocab_size} tokens, the model's",
                   tokenizer.vocab_size)  # fmt: skip
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    seed = int(torch.randint(2**31, ())) if args.seed is None else args.seed
    stops = [stop.replace("\\n", "\n").replace("\\t", "\t") for stop in args.stop]
    new = 200 if args.max_new_tokens is None and args.max_length is None else args.max_new_tokens
    request = Request(
        max_new_tokens=new, max_length=args.max_length, temperature=args.temperature,
        top_k=args.top_k, top_p=args.top_p, min_p=args.min_p,
        repetition_penalty=args.repetition_penalty, num_return_sequences=args.num_samples,
        stop=stops, tokenizer=tokenizer, eos_token_id=tokenizer.eos_token_id, seed=seed,
        use_cache=not args.no_cache, slide=not args.no_slide, speculative=args.speculative,
    )  # fmt: skip
    ids = tokenizer.encode(prompt)
    growth = Growth(model, ids, request)
    began = time.perf_counter()
    if args.num_samples == 1:
        _print_as_it_grows(growth, prompt, tokenizer)
    else:
        _print_samples(growth, prompt, tokenizer, len(ids))
    seconds = time.perf_counter() - began
    tokens = sum(growth.lengths) - len(ids) * args.num_samples
    print(f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:,.0f} tokens/s; --seed {seed}",
          file=sys.stderr)  # fmt: skip
    block = model.config.block_size
    if max(growth.lengths) > block:
        print(f"the text outgrew the model's {block} tokens: each time, it went on with the last "
              f"{max(block // 2, 1)}", file=sys.stderr)  # fmt: skip
    return 0


def _print_as_it_grows(growth: Growth, prompt: str, tokenizer: Tokenizer) -> None:
    text, stop = tokenizer.stream(), StopText(growth.request.stops)
    print(prompt, end="", flush=True)
    for (tokens,) in growth:
        for token in tokens:
            if token not in growth.request.ends:
                print(stop.push(text.push(token)), end="", flush=True)
    print(stop.push(text.finish()) + stop.finish(), flush=True)


def _print_samples(growth: Growth, prompt: str, tokenizer: Tokenizer, given: int) -> None:
    for _ in growth:
        pass
    rows = growth.rows()
    for i, row in enumerate(rows):
        stop = StopText(growth.request.stops)
        new = [token for token in row[given:] if token not in growth.request.ends]
        text = stop.push(tokenizer.decode(new)) + stop.finish()
        print(f"--- sample {i + 1} of {len(rows)} ---\n{prompt}{text}", flush=True)
