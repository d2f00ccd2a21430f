"""The ``fastlm`` command: one verb, one module."""

import argparse
import importlib
import sys
from collections.abc import Sequence

import fastlm

_VERBS = {  # verb: (module, what it does)
    "train": ("fastlm.lm.train", "pre-train a model on text"),
    "generate": ("fastlm.lm.generate", "continue a text"),
    "finetune": ("fastlm.lm.finetune", "adapt a model to a task, or train a classifier"),
    "make-data": ("fastlm.lm.scenarios", "make the data of a task, for finetune"),
    "evaluate": ("fastlm.lm.evaluate", "score a fine-tuned model beside simple baselines"),
    "tokenize": ("fastlm.lm.tokenize", "turn text into files of tokens"),
    "bench": ("fastlm.bench.cli", "what the kernels cost: timed on a GPU, static elsewhere"),
    "env": ("fastlm.env", "versions, GPUs, and which code each op runs here"),
}


def build_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """The command line; only the named verb's module is imported, and only its flags are there."""
    parser = argparse.ArgumentParser(prog="fastlm", description=fastlm.__doc__)
    parser.add_argument("--version", action="version", version=f"fastlm {fastlm.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (module, does) in _VERBS.items():
        sub = verbs.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.")
        if name == verb:
            code = importlib.import_module(module)
            code.add_arguments(sub)
            sub.set_defaults(entry=code.run)  # no flag has this name
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit code: 2, and one line, where the input was at fault."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    verb = next((word for word in words if not word.startswith("-")), None)
    args = build_parser(verb).parse_args(words)
    try:
        return args.entry(args)
    except (ValueError, ArithmeticError, OSError) as error:
        print(f"fastlm {args.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nfastlm {args.verb}: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
