"""``python -m lk_backbones.cli``: the command line without its script."""

from lk_backbones.cli import main

if __name__ == "__main__":
    main()
