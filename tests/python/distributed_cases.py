"""The cases of test_distributed, which a module for each topic defines: each process of a group of four calls them."""

from __future__ import annotations

import distributed_dcp_cases
import distributed_load_cases
import distributed_save_cases
import distributed_torch_cases
import distributed_weights_cases
from ranks import Cases

CASES = Cases()

for _topic in (
    distributed_save_cases,
    distributed_dcp_cases,
    distributed_load_cases,
    distributed_weights_cases,
    distributed_torch_cases,
):
    for _case in _topic.CASES.values():
        CASES(_case)
