"""A few cases of each campaign (tests/campaigns); kills are in tests/test_resume.py."""

import pytest

from tests.campaigns import config, disk, files
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
