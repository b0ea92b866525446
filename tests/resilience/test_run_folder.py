"""The run folder holds what repeats a run, and no secret."""

import json
import os

from yoco_megatron.resilience import run_folder
from yoco_megatron.utils.files import write_json

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwx",
    "NCCL_PLAIN_LOOKING_PASSWORD": "tr0ub4dor",
    "SLURM_JWT": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJyb290In0.c2lnbmF0dXJl",
    "CUDA_PROXY": "http://user:tr0ub4dor@proxy:3128",
    "TORCH_SOMETHING": "ghp_0123456789abcdefghij",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG",
    "MY_DATABASE": "postgres://me:tr0ub4dor@db",
}


def test_no_secret_reaches_the_folder(tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    argv = ["pretrain_yoco.py", "--wandb-api-key", "tr0ub4dor", "--hf-token=tr0ub4dor", "--lr", "1e-3"]
    argv += ["--data-path", "s3://me:tr0ub4dor@bucket/x"]
    run_folder.write_records(tmp_path, argv, "wandb-project: x\n")
    written = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    for name, value in SECRETS.items():
        needle = value if "://" not in value else "tr0ub4dor"
        assert not [path for path, text in written.items() if needle in text], name
    assert not [path for path, text in written.items() if "tr0ub4dor" in text]


def test_records_repeat_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_IB_HCA", "mlx5")
    monkeypatch.setenv("YOCO_ATTEMPT", "7")
    records = run_folder.write_records(tmp_path, ["pretrain_yoco.py", "--lr", "1e-3"], "lr: 1e-3\n")
    assert records == tmp_path / "records/7"
    environment = json.loads((records / "environment.json").read_text())
    assert environment["NCCL_IB_HCA"] == "mlx5" and environment["PATH"] == os.environ["PATH"]
    assert json.loads((records / "command.json").read_text())[1:] == ["pretrain_yoco.py", "--lr", "1e-3"]
    assert "torch==" in (records / "packages.txt").read_text()
    assert (records / "resolved_config.yaml").read_text() == "lr: 1e-3\n"
    assert (records / "git_commit.txt").exists() and (records / "git_diff.patch").exists()


def test_readers_see_whole_files(tmp_path):
    path = tmp_path / "heartbeat.json"
    write_json(path, {"step": 1})
    write_json(path, {"step": 2})
    assert json.loads(path.read_text()) == {"step": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["heartbeat.json"]
