"""The variables of torchrun: allowed values, and refusals in one line."""

from __future__ import annotations

import pytest

from clipgen.errors import ConfigError
from clipgen.utils.distributed import Processes


def test_number_of_processes_without_torchrun_is_one() -> None:
    assert Processes.from_environment({}) == Processes(0, 1, 0)
    Processes().check_address({})


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x'; it must be a number 1 or more"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0'"),
        ({"WORLD_SIZE": "٣"}, "WORLD_SIZE is '٣'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is '2'; it must be a number from 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "1"}, "RANK is '1'; it must be a number from 0 to 0"),
        ({"LOCAL_RANK": "first"}, "LOCAL_RANK is 'first'"),
    ],
)
def test_wrong_torchrun_variable_is_refused_by_name(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Processes.from_environment(environ)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({}, "WORLD_SIZE is 2, but MASTER_ADDR is not set; start with torchrun"),
        ({"MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is ''"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "70000"}, "MASTER_PORT is '70000'"),
    ],
)
def test_several_processes_without_a_master_address_are_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Processes(0, 2, 0).check_address(environ)
