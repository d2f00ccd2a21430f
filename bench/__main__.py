"""``python -m fastlm.bench``: the same as ``fastlm bench``."""

import argparse
import sys

from . import cli

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="fastlm bench")
    cli.add_arguments(parser)
    try:
        code = cli.run(parser.parse_args())
    except (ValueError, OSError) as error:
        print(f"fastlm bench: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)
