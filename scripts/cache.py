"""`pixart-ft cache`, for `accelerate launch scripts/cache.py --config configs/quickstart.yaml`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone needs no installation

from pixart_ft.cli import main

if __name__ == "__main__":
    sys.exit(main(["cache", *sys.argv[1:]]))
