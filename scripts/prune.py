"""Score, plan, remove and compensate as a recipe says, and stop before distillation.

    python scripts/prune.py recipes/minilm/movie.yaml
    accelerate launch --num_processes 2 scripts/prune.py recipes/minilm/movie.yaml
    torchrun --nproc_per_node 2 scripts/prune.py recipes/minilm/movie.yaml

It is `hfprune prune` as a file, which is what launchers start.
"""

import sys

from hfprune.cli import main

if __name__ == "__main__":
    main(["prune", *sys.argv[1:]])
