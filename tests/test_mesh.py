"""Every mesh of eight devices gives the same trajectories, forks and update as one device."""

import subprocess
import sys

import numpy as np
import pytest

from tests.makers import with_devices

SHAPES = ["8x1x1", "1x8x1", "1x1x8", "2x4x1", "4x2x1", "2x1x4", "4x1x2", "1x2x4", "1x4x2", "2x2x2"]
FEW = ["2x2x2"]


def computed(folder, devices, shapes):
    out = folder / f"{devices}-{len(shapes)}.npz"
    command = [sys.executable, "-m", "tests.mesh_worker", str(out), *shapes]
    subprocess.run(command, check=True, env=with_devices(devices), timeout=900)
    arrays = np.load(out)
    return {
        shape: {key.partition(" ")[2]: arrays[key] for key in arrays if key.startswith(f"{shape} ")}
        for shape in shapes
    }


@pytest.mark.parametrize(
    "shapes", [FEW, pytest.param([s for s in SHAPES if s not in FEW], marks=pytest.mark.slow)]
)
def test_a_mesh_changes_nothing(tmp_path, shapes):
    one = computed(tmp_path, 1, ["1x1x1"])["1x1x1"]
    for shape, result in computed(tmp_path, 8, shapes).items():
        assert result.keys() == one.keys()
        whole = {"tokens", "forked tokens"}
        for name in whole:
            np.testing.assert_array_equal(result[name], one[name], err_msg=f"{shape} {name}")
        for name in one.keys() - whole:
            np.testing.assert_allclose(
                result[name], one[name], atol=1e-4, err_msg=f"{shape} {name}"
            )
