"""`pretrain_yoco.main` in a process where every function of torch.cuda without a stand-in raises; run as a script.

    guarded_run.py [--without STAND_IN] FLAGS_OF_PRETRAIN_YOCO ...

Prints, as its last line, a JSON list of the calls that were made all the same: [name, the place that called].
"""

import functools
import inspect
import json
import sys
import traceback

import torch

from yoco_megatron.runtime import cpu
from yoco_megatron.startup.prepare import prepare

# Functions that need no stand-in, because without a GPU they answer correctly by themselves.
ALLOWED: dict[str, str] = {}

violations: list[tuple[str, str]] = []


def unguarded(name: str, value: object) -> bool:
    """Whether `torch.cuda.name` must raise: public, of torch.cuda itself, not served by the CPU runtime."""
    of_cuda = getattr(value, "__module__", "").startswith("torch.cuda") and callable(value)
    is_exception = inspect.isclass(value) and issubclass(value, BaseException)
    is_legacy_type = name.endswith(("Tensor", "Storage"))  # names to compare with; the types cannot be changed
    served = name.startswith("_") or name in cpu.STAND_INS or name in ALLOWED
    return of_cuda and not (served or is_exception or is_legacy_type)


def refuse(name: str, original: object):
    @functools.wraps(original, updated=())
    def call(*args, **kwargs):
        place = next(
            f"{frame.filename}:{frame.lineno} {frame.line}"
            for frame in reversed(traceback.extract_stack()[:-1])
            if frame.filename != __file__
        )
        violations.append((name, place))
        raise RuntimeError(f"torch.cuda.{name} has no stand-in in yoco_megatron/runtime/cpu.py; called by {place}")

    return call


def guard() -> list[str]:
    """Make them raise; their names. Of a class it is the constructor, for the class may be named in annotations."""
    names = [name for name in dir(torch.cuda) if unguarded(name, getattr(torch.cuda, name))]
    for name in names:
        value = getattr(torch.cuda, name)
        if inspect.isclass(value):
            value.__init__ = refuse(name, value.__init__)
        else:
            setattr(torch.cuda, name, refuse(name, value))
    return names


def main(argv: list[str]) -> None:
    if argv[0] == "--without":
        del cpu.STAND_INS[argv[1]]
        argv = argv[2:]
    install = cpu.install

    def install_and_guard() -> None:
        install()
        print("guarded:", *guard())

    cpu.install = install_and_guard  # megatron is imported after it, and keeps names of torch.cuda
    prepare()
    import pretrain_yoco

    try:
        pretrain_yoco.main(argv)
    finally:
        print(json.dumps(violations))


if __name__ == "__main__":
    main(sys.argv[1:])
