"""Every family, by the kind of model that it is."""

from __future__ import annotations

from zoo.decoders import DENSE, MIXTURES, RECURRENT
from zoo.family import Family
from zoo.modules import MODULES
from zoo.senses import IMAGES, SOUNDS, TOGETHER
from zoo.texts import ENCODERS, HEADS, WRITERS

FAMILIES: dict[str, tuple[Family, ...]] = {
    "Causal language models": DENSE,
    "Mixtures of experts": MIXTURES,
    "State spaces, recurrences and hybrids": RECURRENT,
    "Encoders of text": ENCODERS,
    "Encoder-decoders": WRITERS,
    "Classifiers, rewards and preferences": HEADS,
    "Images": IMAGES,
    "Sounds": SOUNDS,
    "Images and text": TOGETHER,
    "PyTorch modules and adapters": MODULES,
}
