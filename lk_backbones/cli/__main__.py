"""Lets ``python -m lk_backbones.cli`` run the command line."""

from lk_backbones.cli import main

main()
