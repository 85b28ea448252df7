"""Score heads and neurons as a recipe says, and stop.

    python scripts/score.py recipes/minilm/movie.yaml
    accelerate launch --num_processes 2 scripts/score.py recipes/minilm/movie.yaml
    torchrun --nproc_per_node 2 scripts/score.py recipes/minilm/movie.yaml

It is `hfprune score` as a file, which is what launchers start.
"""

import sys

from hfprune.cli import main

if __name__ == "__main__":
    main(["score", *sys.argv[1:]])
