"""step3.5_processing_data.py: a record per response in generation order; refused mismatches."""

import importlib.util
import json

import pytest
import tiny_models
from conftest import ROOT

from rewardlib import artifacts
from rewardlib.errors import InputError
from rewardlib.llm import responses

spec = importlib.util.spec_from_file_location("step3_5", ROOT / "step3.5_processing_data.py")
step3_5 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(step3_5)
REWARDS = {
    "train-0": [0.5, 2.0, 1.0],
    "train-1": [3, 3, -1],
    "train-2": [1, 2, 3],
    "train-3": [3, 2, 1],
}
REWARDS |= {"train-4": [0, 0, 0], "train-5": [-2.5, -3.5, -1.5]}


@pytest.fixture
def gen(tmp_path):
    folder = responses.run_folder(tmp_path, "hh-rlhf-helpful", "gemma7b", "none", "-")
    tiny_models.make_parts(folder, "train", tiny_models.hand_rows(6, 3))
    tiny_models.make_rewards(folder, "train", REWARDS)
    return folder


def join(gen, *flags):
    where = [
        "--gen_dir",
        str(gen.parent),
        "--eval_dataset",
        "hh-rlhf-helpful",
        "--adapter_name",
        "none",
    ]
    step3_5.main([*where, "--reward_model", "rm", *flags])
    return [json.loads(line) for line in (gen / "records_rm_train.jsonl").read_text().splitlines()]


def change(path, edit):
    """Change a JSONL file and its manifest entry, as if the step had written the changed file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    artifacts.write_jsonl(path, edit(rows))
    manifest = artifacts.read_manifest(path.parent)
    for entry in manifest.values():
        if path.name in entry["outputs"]:
            entry["outputs"][path.name] = artifacts.describe_file(path)
    artifacts.write_json(path.parent / artifacts.MANIFEST, manifest)


def test_exact_records(gen, capsys):
    records = join(gen)
    rows = {row["id"]: row for row in tiny_models.hand_rows(6, 3)}
    assert [(r["id"], r["k"]) for r in records] == [
        (f"train-{i}", k) for i in range(6) for k in range(3)
    ]
    assert all(r["response"] == rows[r["id"]]["responses"][r["k"]] for r in records)
    assert all(r["reward"] == REWARDS[r["id"]][r["k"]] for r in records)
    ranks = [[r["rank"] for r in records[i : i + 3]] for i in range(0, 18, 3)]
    assert ranks == [[3, 1, 2], [1, 2, 3], [3, 2, 1], [1, 2, 3], [1, 2, 3], [2, 3, 1]]
    assert (
        "6 train prompts x 3 responses (0 prompts were dropped in step 2, 0 responses are empty)"
        in (capsys.readouterr().out)
    )
    join(gen)
    assert "already done" in capsys.readouterr().out


def test_fewer_prompts_than_parts(tmp_path):
    folder = responses.run_folder(tmp_path, "hh-rlhf-helpful", "gemma7b", "none", "-")
    tiny_models.make_parts(folder, "train", tiny_models.hand_rows(2, 3))
    tiny_models.make_rewards(folder, "train", REWARDS)
    assert len(join(folder)) == 6


def test_missing_parts(gen):
    (gen / "train-part_3" / "manifest.json").rename(gen / "train-part_3" / "kept")
    with pytest.raises(
        InputError, match=r"train-part_3: .* files of step2_gen_sample.py --split 3 are missing"
    ):
        join(gen)
    with pytest.raises(InputError, match="of step2_gen_sample.py --split 0 are missing"):
        join(gen, "--data_class", "test")
    (gen / "train-part_3" / "kept").rename(gen / "train-part_3" / "manifest.json")
    with pytest.raises(InputError, match="of step3_reward_annotation.py --split 0 are missing"):
        join(gen, "--reward_model", "another")


def test_k_must_match(gen, tmp_path):
    with pytest.raises(InputError, match="expected 4 responses a prompt, found 3"):
        join(gen, "--n_samples", "4")
    other = tiny_models.make_parts(tmp_path / "other", "train", tiny_models.hand_rows(6, 2))
    (gen / "train-part_2").rename(tmp_path / "old")
    (other / "train-part_2").rename(gen / "train-part_2")
    with pytest.raises(InputError, match="of step3_reward_annotation.py --split 2 are missing"):
        join(gen)
    manifest = artifacts.read_manifest(gen / "train-part_2")
    manifest["step3 rm"] = artifacts.read_manifest(tmp_path / "old")["step3 rm"]
    artifacts.write_json(gen / "train-part_2" / "manifest.json", manifest)
    with pytest.raises(
        InputError, match=r"train-part_2: expected the K of train-part_0 \(3\), found 2"
    ):
        join(gen)


def test_shuffled_responses_are_found(gen):
    """The responses to a prompt are in another order than when they were scored."""
    path = gen / "train-part_4" / "responses.jsonl"
    change(path, lambda rows: [{**row, "responses": row["responses"][::-1]} for row in rows])
    with pytest.raises(
        InputError, match="expected rewards of the present responses, found rewards of earlier ones"
    ):
        join(gen)
    manifest = artifacts.read_manifest(path.parent)
    manifest["step3 rm"]["inputs"]["responses"] = manifest["step2"]["outputs"]["responses.jsonl"][
        "sha256"
    ]
    artifacts.write_json(path.parent / "manifest.json", manifest)
    with pytest.raises(
        InputError, match="expected the reward of response 0 to train-4, found that of another text"
    ):
        join(gen)


def test_other_prompts_missing_rewards_and_changed_files(gen):
    path = gen / "train-part_0" / "rewards_rm.jsonl"
    kept = path.read_bytes()
    change(path, lambda rows: [{**row, "id": "another"} for row in rows])
    with pytest.raises(InputError, match=r"expected the prompts of responses.jsonl, found others"):
        join(gen)
    path.write_bytes(kept)
    change(path, lambda rows: [{**row, "rewards": row["rewards"][:2]} for row in rows])
    with pytest.raises(
        InputError, match=r"expected 3 finite rewards of train-0, found \[0.5, 2.0\]"
    ):
        join(gen)
    path.write_bytes(kept + b"\n")
    with pytest.raises(
        InputError, match="as step3_reward_annotation.py wrote it, found a changed file"
    ):
        join(gen)
    assert not (gen / "records_rm_train.jsonl").exists()


def test_an_error_leaves_the_old_records(gen):
    join(gen)
    before = (gen / "records_rm_train.jsonl").read_bytes()
    path = gen / "train-part_0" / "prompts.json"
    for part in range(responses.PARTS):
        path = gen / f"train-part_{part}" / "prompts.json"
        about = artifacts.read_json(path, "step 2")
        artifacts.write_json(path, {**about, "n_kept": 7})
        manifest = artifacts.read_manifest(path.parent)
        manifest["step2"]["outputs"]["prompts.json"] = artifacts.describe_file(path)
        manifest["step3 rm"]["hash"] = "changed"
        artifacts.write_json(path.parent / "manifest.json", manifest)
    with pytest.raises(InputError, match="expected 7 prompts, found 6"):
        join(gen)
    assert (gen / "records_rm_train.jsonl").read_bytes() == before
