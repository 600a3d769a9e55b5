"""What several runs at once get of a machine."""

from __future__ import annotations

import pytest

from relora_ds.errors import ConfigError
from relora_ds.sweeps.share import shares


def test_a_run_alone_is_left_to_the_launcher() -> None:
    assert shares(1, None, cores=8, gpus=["0", "1"], environment={}) == [{}]


def test_cores_are_shared_unless_the_user_decides() -> None:
    assert shares(2, 2, cores=8, gpus=[], environment={}) == [{"OMP_NUM_THREADS": "2"}] * 2
    assert shares(3, None, cores=2, gpus=[], environment={}) == [{"OMP_NUM_THREADS": "1"}] * 3
    assert shares(2, 2, cores=8, gpus=[], environment={"OMP_NUM_THREADS": "3"}) == [{}, {}]


def test_each_has_its_own_gpus() -> None:
    found = shares(2, 2, cores=16, gpus=["4", "5", "6", "GPU-7f"], environment={})
    assert [place["CUDA_VISIBLE_DEVICES"] for place in found] == ["4,5", "6,GPU-7f"]
    with pytest.raises(ConfigError, match=r"--jobs=3: .* need 6 GPUs, and there are 4; use at most 2"):
        shares(3, 2, cores=16, gpus=["0", "1", "2", "3"], environment={})
    with pytest.raises(ConfigError, match="nproc=None: is required"):
        shares(2, None, cores=16, gpus=["0", "1"], environment={})
