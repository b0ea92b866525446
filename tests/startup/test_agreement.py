"""A mistake that one process finds ends all, without a launcher that would."""

import pytest
from support.worlds import spawn

from yoco_megatron.resilience.exit_record import InUse
from yoco_megatron.startup import agreement
from yoco_megatron.utils.ports import free_port


def _check(errors: dict[int, Exception]) -> list[str]:
    """What this process raises in three checks in a row, the second of which finds `errors`, by rank."""
    import os

    import torch

    said = []
    for found in ({}, errors, {}):
        try:
            with agreement.of_all_ranks():
                if int(os.environ["RANK"]) in found:
                    raise found[int(os.environ["RANK"])]
            said.append("")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    torch.distributed.init_process_group("gloo")  # on the same port
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return said


MEETING = {"MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ({0: ValueError("--load is\nanother")}, "ValueError: --load is\nanother"),
        ({2: ValueError("no such file")}, "ValueError: no such file"),
        ({0: InUse("run"), 1: InUse("run"), 2: InUse("run")}, "InUse: run"),
        ({0: InUse("run")}, "InUse: run"),
    ],
)
def test_all_raise_what_one_found(errors, said):
    assert spawn(_check, 3, (errors,), env=MEETING | {"MASTER_PORT": str(free_port())}) == [["", said, ""]] * 3


def test_others_do_not_wait_for_one_whose_disk_fails():
    own, other = spawn(_check, 2, ({0: OSError(5, "no answer")},), env=MEETING | {"MASTER_PORT": str(free_port())})
    assert own == ["", "OSError: [Errno 5] no answer", ""]
    assert other == ["", "RuntimeError: rank 0: OSError(5, 'no answer')", ""]


@pytest.mark.parametrize(
    "world", [{}, {"WORLD_SIZE": "2", "RANK": "0"}, {"WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}]
)
def test_where_there_is_nobody_to_ask(world, monkeypatch):
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="mine"), agreement.of_all_ranks():
        raise ValueError("mine")
    with agreement.of_all_ranks():
        pass


@pytest.mark.parametrize(("rank", "launcher", "tells"), [(0, "True", True), (1, "True", True), (1, "False", False)])
def test_the_first_one_has_time_to_tell_its_mistake(rank, launcher, tells, monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr(agreement.time, "sleep", waited.append)
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_USE_AGENT_STORE": launcher}.items():
        monkeypatch.setenv(name, str(value))
    assert agreement.tells_error() == tells
    assert waited == ([11] if rank and tells else [])
