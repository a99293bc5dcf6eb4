"""Topology: where rank, world size and worker come from, and what a contradictory environment is told."""

import pytest
from torch.utils.data import DataLoader, IterableDataset

from ddp_stream.topology import Topology

STEP = {"SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "3"}, (2, 3)),
        ({**STEP, "SLURM_PROCID": "5", "SLURM_NTASKS": "6"}, (5, 6)),
        ({"SLURM_STEPID": "7", "SLURM_PROCID": "5", "SLURM_NTASKS": "6"}, (5, 6)),  # the step's older name
        # torchrun inside srun: each task starts several ranks, so RANK is the one that counts.
        ({**STEP, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "RANK": "5", "WORLD_SIZE": "8"}, (5, 8)),
    ],
)
def test_ranks_come_from_the_launcher_first_then_from_slurm(environ, expected):
    topology = Topology.detect(environ)
    assert (topology.rank, topology.world_size) == expected


@pytest.mark.parametrize(
    "step",
    [
        {},  # the batch script: SLURM_PROCID=0 and SLURM_NTASKS=8 are set, yet it is one process
        {"SLURM_STEP_ID": ""},
        {"SLURM_STEP_ID": "4294967290"},  # 0xfffffffa: interactive (salloc)
        {"SLURM_STEP_ID": "4294967291"},  # 0xfffffffb: the batch script
        {"SLURM_STEP_ID": "4294967292"},  # 0xfffffffc: extern
        {"SLURM_STEP_ID": "4294967293"},  # 0xfffffffd: pending
    ],
)
def test_slurm_variables_outside_a_step_are_ignored(step):
    topology = Topology.detect({**step, "SLURM_PROCID": "0", "SLURM_NTASKS": "8"})
    assert (topology.rank, topology.world_size) == (0, 1)


@pytest.mark.parametrize(
    ("environ", "seen"),
    [
        ({"RANK": "1"}, ["RANK='1'", "WORLD_SIZE=None", "WORLD_SIZE is missing"]),
        ({"WORLD_SIZE": "4"}, ["RANK=None", "WORLD_SIZE='4'", "RANK is missing"]),
        ({"RANK": "one", "WORLD_SIZE": "4"}, ["RANK='one'", "WORLD_SIZE='4'", "whole numbers"]),
        ({"RANK": "0", "WORLD_SIZE": "4.0"}, ["RANK='0'", "WORLD_SIZE='4.0'", "whole numbers"]),
        ({"RANK": "", "WORLD_SIZE": ""}, ["RANK=''", "WORLD_SIZE=''", "whole numbers"]),
        ({"RANK": "4", "WORLD_SIZE": "4"}, ["RANK='4'", "WORLD_SIZE='4'", "0..world_size-1"]),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, ["RANK='-1'", "WORLD_SIZE='4'", "0..world_size-1"]),
        ({"RANK": "0", "WORLD_SIZE": "0"}, ["RANK='0'", "WORLD_SIZE='0'", "0..world_size-1"]),
        ({**STEP, "SLURM_PROCID": "1"}, ["SLURM_PROCID='1'", "SLURM_NTASKS=None", "SLURM_NTASKS is missing"]),
        (
            {**STEP, "SLURM_PROCID": "3", "SLURM_NTASKS": "2"},
            ["SLURM_PROCID='3'", "SLURM_NTASKS='2'", "0..world_size-1"],
        ),
        # A half-set launcher is an error, not a reason to fall back on Slurm.
        ({**STEP, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "RANK": "1"}, ["RANK='1'", "WORLD_SIZE=None"]),
    ],
)
def test_a_contradictory_environment_is_quoted_in_the_error(environ, seen):
    with pytest.raises(ValueError, match="environment has") as error:
        Topology.detect(environ)
    assert [text for text in seen if text not in str(error.value)] == []


def test_the_combined_index_counts_workers_within_ranks():
    # 2 ranks x 3 workers: rank 0 has global workers 0, 1, 2 and rank 1 has 3, 4, 5.
    combined = [Topology(rank, 2, worker, 3).global_worker for rank in range(2) for worker in range(3)]
    assert combined == [0, 1, 2, 3, 4, 5]
    assert Topology(1, 2, 0, 3).global_workers == 6


def test_no_workers_count_as_one_reader():
    topology = Topology(rank=1, world_size=2, worker=0, num_workers=0)
    assert (topology.global_worker, topology.global_workers) == (1, 2)


@pytest.mark.parametrize("wrong", [(2, 2, 0, 1), (-1, 2, 0, 1), (0, 1, 3, 3), (0, 1, 1, 0), (0, 0, 0, 1)])
def test_an_index_outside_its_count_is_an_error(wrong):
    with pytest.raises(ValueError, match="read twice or not at all"):
        Topology(*wrong)


class _WhoAmI(IterableDataset):
    def __iter__(self):
        topology = Topology.detect({"RANK": "1", "WORLD_SIZE": "2"})
        yield topology.worker, topology.num_workers, topology.global_worker, topology.global_workers


def test_workers_of_a_data_loader_know_their_index():
    # Rank 1 of 2 with 2 workers: global workers 1 * 2 + 0, 1 of 2 * 2.
    seen = sorted(map(tuple, DataLoader(_WhoAmI(), batch_size=None, num_workers=2)))
    assert seen == [(0, 2, 2, 4), (1, 2, 3, 4)]


def test_the_main_process_of_a_data_loader_is_worker_0_of_1():
    assert [tuple(item) for item in DataLoader(_WhoAmI(), batch_size=None)] == [(0, 1, 1, 2)]
