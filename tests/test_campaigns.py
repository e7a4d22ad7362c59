"""A few cases of each campaign (tests/campaigns); kills are in tests/test_resume.py too, and hosts in tests/test_hosts.py."""

import argparse

import pytest

from tests.campaigns import config, disk, files, kills, processes, rewards
from tests.campaigns.common import SmallRun


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return SmallRun(tmp_path_factory.mktemp("small"))


def bad(tally):
    return [case for case in tally.cases if case[0] in ("traceback", "silent")]


@pytest.mark.slow
def test_damaged_files(small):
    tally = files.campaign(6, 3, small)
    assert len(tally.cases) == 6 and not bad(tally)


@pytest.mark.slow
def test_files_that_cannot_grow(small):
    tally = disk.slim(3, small)
    assert len(tally.cases) == 3 and not bad(tally)
    assert tally.count("clear line") >= 1, "the limit was never met"


def test_settings_are_taken_or_refused_in_one_line(tmp_path):
    tally = config.campaign(300, 1, tmp_path, only_parse=True)
    assert not bad(tally)
    assert tally.count("clear line") > 50 and tally.count("harmless") > 50


@pytest.mark.slow
def test_hostile_rewards(tmp_path):
    tally = rewards.campaign(4, 5, tmp_path, only_scores=True)
    assert tally.count("harmless") == 4, tally.cases


@pytest.mark.nightly
def test_hostile_rewards_in_runs(tmp_path):
    tally = rewards.campaign(len(rewards.EXPECTED), 1, tmp_path)
    assert tally.count("harmless") == len(rewards.EXPECTED), tally.cases


@pytest.mark.nightly
@pytest.mark.parametrize("kind", kills.KINDS)
def test_kills(kind, tmp_path):
    tally, _ = kills.campaign(kind, 3, 1, [], tmp_path)
    assert tally.count("harmless") == len(tally.cases) > 3, tally.cases


@pytest.mark.nightly
def test_disturbed_hosts(tmp_path):
    args = argparse.Namespace(config="configs/dapo.py:runlocal", hosts=2, seed=1, num=2)
    tally = processes.campaign(args, [], tmp_path)
    assert len(tally.cases) == 2 and not bad(tally)
