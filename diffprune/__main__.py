"""`python -m diffprune` is `diffprune`."""

from diffprune.cli import main

main()
