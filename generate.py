"""The reference's command line: ``python generate.py --ckpt_dir DIR --prompt TEXT ...``."""

import sys

from nabla_attn.cli import app

if __name__ == "__main__":
    app(["wan", *sys.argv[1:]], prog_name="generate.py")
