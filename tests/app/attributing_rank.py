"""One rank of the test of `attribute` (as a module): the command, with chunks of one image."""

from __future__ import annotations

import sys

from resnet_func.app.answers import attributing
from resnet_func.app.cli import main

if __name__ == "__main__":
    attributing.CHUNK_ROWS = 1
    sys.exit(main(sys.argv[1:]))
