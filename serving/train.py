"""`python -m serving.train protocol|hemorrhage [options]`: train or evaluate one of the two models."""

import importlib
import sys
from collections.abc import Sequence

from herald.errors import HeraldError

MODELS = ("protocol", "hemorrhage")


def main(argv: Sequence[str]) -> int:
    """Hand over to the named model's own training command; 2 for a model that does not exist."""
    if not argv or argv[0] not in MODELS:
        print(f"usage: python -m serving.train {{{'|'.join(MODELS)}}} [options]; --help after a name", file=sys.stderr)
        return 2
    module = importlib.import_module(f"serving.train_{argv[0]}")  # only the model asked for is imported
    return int(module.main(list(argv[1:])) or 0)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except HeraldError as error:
        sys.exit(str(error))
