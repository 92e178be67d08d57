"""The wheel holds rewardlib alone, and works beside modules of other projects named as ours."""

import os
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

FOREIGN = 'raise RuntimeError("a module of another project, which nothing of rewardlib imports")\n'
FIVE_CALLS = """
import sys
from pathlib import Path

import numpy as np

import rewardlib
from rewardlib import BT_MLP, calc_bon, calc_spearmanr, load_embd_data, pair_annotate

assert Path(rewardlib.__file__).is_relative_to(sys.argv[1]), rewardlib.__file__
rng = np.random.default_rng(0)
embeddings = rng.standard_normal((40, 6, 8)).astype(np.float32)
np.save("embd_tiny_tiny_poems_train.npy", embeddings)
np.save("reward_tiny_tiny_poems_train.npy", embeddings[:, :, :1])
names = {"task": "poems", "res_gen_model": "tiny", "embed_model": "tiny", "split": "train"}
embeddings, rewards = load_embd_data(**names, root=".")
pairs, labels = pair_annotate(embeddings, rewards, annotation_quality=10)
scores = BT_MLP(hidden=(16, 8), epochs=4, learning_rate=0.01).fit(pairs, labels).predict(embeddings)
print(calc_spearmanr(scores, rewards), calc_bon(scores, rewards, N=6))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    # a copy without build/, which would bring files of earlier builds into the wheel
    source = folder / "source"
    files = ("pyproject.toml", "README.md", "LICENSE", "rewardlib", "networks.py", "studies")
    source.mkdir()
    for name in files:
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    subprocess.run([*pip, *options, str(source)], check=True, capture_output=True)
    [path] = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_library_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"rewardlib"}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rewardlib").rglob("*.py")}
    templates = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "rewardlib" / "report" / "templates").iterdir()
    }
    assert sources | templates | {"rewardlib/py.typed"} <= set(names)


def test_the_five_calls_run_beside_modules_of_the_same_names(wheel, tmp_path):
    site, project = tmp_path / "site", tmp_path / "project"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--target", str(site), str(wheel)], check=True)
    project.mkdir()
    for name in ("networks", "cli"):
        (project / f"{name}.py").write_text(FOREIGN)
    (project / "five_calls.py").write_text(FIVE_CALLS)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "five_calls.py", str(site)],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    rho, best = map(float, result.stdout.splitlines()[-1].split())
    assert rho > 0.5 and best > 0.5
