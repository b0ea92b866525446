"""The mixers of the self-decoder: one record each, and the table in which everything else looks them up.

A new mixer is its op, its module and its record; nobody compares a mixer's name with a string. Imports no torch.

`--self-decoder` is one mixer's name for all layers, or a pattern, one letter for each (RRSS): `self_decoder`, which the
functions below read.
"""

from collections.abc import Sequence

from yoco_megatron.mixers.gated_delta_net import GATED_DELTA_NET
from yoco_megatron.mixers.gated_retention import GATED_RETENTION
from yoco_megatron.mixers.mamba2 import MAMBA2
from yoco_megatron.mixers.record import Mixer, Sizes
from yoco_megatron.mixers.sliding_window import SLIDING_WINDOW
from yoco_megatron.utils.errors import nearest, require

__all__ = [
    "BUILT_IN",
    "GATED_DELTA_NET",
    "GATED_RETENTION",
    "MAMBA2",
    "MIXERS",
    "SLIDING_WINDOW",
    "Mixer",
    "Sizes",
    "get_mixer",
    "mixer_of_layer",
    "mixers_in",
    "of_layers",
    "options_of_others",
    "pattern_of",
    "register",
]

BUILT_IN = (GATED_RETENTION, SLIDING_WINDOW, GATED_DELTA_NET, MAMBA2)
MIXERS: dict[str, Mixer] = {}


def register(mixer: Mixer) -> Mixer:
    """Make `--self-decoder NAME` mean `mixer`. Raises ValueError for a name or letter that another one has."""
    for other in MIXERS.values():
        if other is not mixer and mixer.name == other.name:
            raise ValueError(f"--self-decoder {mixer.name}: two mixers have this name; rename one")
        if other is not mixer and mixer.letter == other.letter:
            raise ValueError(f"--self-decoder {mixer.name}: {other.name} has the letter {mixer.letter}; take another")
    MIXERS[mixer.name] = mixer
    return mixer


def get_mixer(name: str) -> Mixer:
    """The record of `--self-decoder NAME`. Raises ValueError for a name that no record has."""
    if name not in MIXERS:
        letters = ", or a letter for each layer" if name != name.lower() else ""
        known = f"use one of {', '.join(MIXERS)}{letters}"
        raise ValueError(f"--self-decoder {name} is unknown: {known}{nearest(name, MIXERS)}")
    return MIXERS[name]


def _is_pattern(self_decoder: str) -> bool:
    return self_decoder.isalpha() and self_decoder.isupper()


def _of_letter(letter: str, pattern: str) -> Mixer:
    for mixer in MIXERS.values():
        if mixer.letter == letter:
            return mixer
    known = ", ".join(f"{mixer.letter} {mixer.name}" for mixer in MIXERS.values())
    raise ValueError(f"--self-decoder-pattern {pattern}: no mixer has the letter {letter}: {known}")


def pattern_of(words: Sequence[str]) -> str:
    """`self_decoder` of what the flag was given: a name, a pattern, or names or letters, one for each layer.

    Raises ValueError for an unknown name or letter.
    """
    if len(words) > 1:
        words = ["".join(word if _is_pattern(word) else get_mixer(word).letter for word in words)]
    (self_decoder,) = words
    mixers_in(self_decoder)
    return self_decoder


def mixers_in(self_decoder: str) -> dict[Mixer, float]:
    """The mixers, each with its share of the layers. Raises ValueError for an unknown name or letter."""
    if not _is_pattern(self_decoder):
        return {get_mixer(self_decoder): 1.0}
    letters = dict.fromkeys(self_decoder)
    return {_of_letter(letter, self_decoder): self_decoder.count(letter) / len(self_decoder) for letter in letters}


def mixer_of_layer(self_decoder: str, index: int) -> Mixer:
    """That of layer `index` of the self-decoder."""
    return _of_letter(self_decoder[index], self_decoder) if _is_pattern(self_decoder) else get_mixer(self_decoder)


def of_layers(self_decoder: str, num_layers: int) -> str:
    """The same for so many layers: a pattern of one mixer is its name.

    Raises ValueError for another number of letters than layers.
    """
    if not _is_pattern(self_decoder):
        return self_decoder
    require(
        len(self_decoder) == num_layers,
        f"--self-decoder-pattern {self_decoder} has {len(self_decoder)} letters, and the self-decoder {num_layers} "
        "layers: write one letter for each, or change --num-self-decoder-layers",
    )
    mixer, *others = mixers_in(self_decoder)
    return self_decoder if others else mixer.name


def options_of_others(self_decoder: str) -> set[str]:
    """Fields that only mixers read that no layer has."""
    own = {option for mixer in mixers_in(self_decoder) for option in mixer.options}
    return {option for mixer in MIXERS.values() for option in mixer.options} - own


for mixer in BUILT_IN:
    register(mixer)
