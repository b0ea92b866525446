"""The mixers of the self-decoder: one record each, and the table in which everything else looks them up.

A new mixer is its op, its module and its record; nobody compares a mixer's name with a string. Imports no torch.
"""

from yoco_megatron.mixers.gated_retention import GATED_RETENTION
from yoco_megatron.mixers.record import Mixer, Sizes
from yoco_megatron.mixers.sliding_window import SLIDING_WINDOW
from yoco_megatron.utils.errors import nearest

__all__ = [
    "BUILT_IN",
    "GATED_RETENTION",
    "MIXERS",
    "SLIDING_WINDOW",
    "Mixer",
    "Sizes",
    "get_mixer",
    "options_of_others",
    "register",
]

BUILT_IN = (GATED_RETENTION, SLIDING_WINDOW)
MIXERS: dict[str, Mixer] = {}


def register(mixer: Mixer) -> Mixer:
    """Make `--self-decoder NAME` mean `mixer`. Raises ValueError for a name that is taken by another one."""
    if MIXERS.setdefault(mixer.name, mixer) is not mixer:
        raise ValueError(f"--self-decoder {mixer.name}: two mixers have this name; rename one")
    return mixer


def get_mixer(name: str) -> Mixer:
    """The record of `--self-decoder NAME`. Raises ValueError for a name that no record has."""
    if name not in MIXERS:
        raise ValueError(f"--self-decoder {name} is unknown: use one of {', '.join(MIXERS)}{nearest(name, MIXERS)}")
    return MIXERS[name]


def options_of_others(name: str) -> set[str]:
    """Fields that only mixers other than `name` read."""
    return {option for mixer in MIXERS.values() for option in mixer.options} - {*get_mixer(name).options}


for mixer in BUILT_IN:
    register(mixer)
