"""Do what a recipe asks for up to distillation, and stop before evaluation.

    python scripts/distill.py recipes/minilm/movie.yaml
    accelerate launch --num_processes 2 scripts/distill.py recipes/minilm/movie.yaml
    torchrun --nproc_per_node 2 scripts/distill.py recipes/minilm/movie.yaml

It is `hfprune distill` as a file, which is what launchers start.
"""

import sys

from hfprune.cli import main

if __name__ == "__main__":
    main(["distill", *sys.argv[1:]])
