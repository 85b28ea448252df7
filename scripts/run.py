"""Do everything that a recipe asks for; run it again to go on where it stopped.

    python scripts/run.py recipes/minilm/movie.yaml
    accelerate launch --num_processes 2 scripts/run.py recipes/minilm/movie.yaml
    torchrun --nproc_per_node 2 scripts/run.py recipes/minilm/movie.yaml

It is `hfprune run` as a file, which is what launchers start.
"""

import sys

from hfprune.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
