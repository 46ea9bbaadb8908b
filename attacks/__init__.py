"""Executable attacks on the threat model (`docs/threat-model.md`): what a stranger's file tries, and what stops it.

`python -m attacks` runs all and prints a table; `python -m attacks.NAME` runs one, and exits with 0 where it was
stopped. An attack that does nothing where nothing stops it would prove nothing: each has a `live`, which has to work.

    live(folder) -> bool              whether the harm comes about where nothing stops it
    attack(folder) -> Iterator[Stop]  tries it on this library, in every place that it knows

`tests/test_attacks.py` runs each. The bytes are harmless: what they execute makes an empty directory.
"""

import os

# Before anything is imported that reads them.
os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"
