"""The benchmark of self-speculative generation: what it trains, what it continues, what it counts."""

import json
from argparse import Namespace
from functools import partial
from pathlib import Path

import mtp
from paper_ordering import job_of
from support.exported import model_that_drafts

from yoco_megatron.inference.generation import CachedModel, Sampling
from yoco_megatron.inference.speculative import SpeculativeModel


def test_trains_the_layer(tmp_path: Path) -> None:
    options = Namespace(
        folder=tmp_path, models=["retention", "window"], rates=[1e-3], seeds=[1], size="tiny", batch_tokens=128,
        length=32, tokens=1280, micro_batch_size=16, evaluations=10, gpus=0, split="98,2,0", flags="",
    )  # fmt: skip
    names = ["retention_mtp_0.001_1_1.28K", "window_mtp_0.001_1_1.28K"]
    jobs = [job_of(case, options) for case in mtp.cases(options, {})]
    assert [job.name for job in jobs] == names and all("--mtp-num-layers" in job.flags for job in jobs)


def test_continues_documents_of_the_validation_part(tmp_path: Path) -> None:
    texts = [chr(ord("a") + number) * (1000 if number != 18 else 5) for number in range(20)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = Namespace(folder=tmp_path, split="80,20,0", prompts=2)
    found = mtp.prompts_of(options, lambda text: list(map(ord, text)))
    assert found == [[ord(letter)] * mtp.PROMPT for letter in "qr"]
    options.prompts = 9
    assert len(mtp.prompts_of(options, lambda text: list(map(ord, text)))) == 3


def test_counts_all_prompts() -> None:
    model, prompts = model_that_drafts("gated_retention", 1), [[1, 2, 0], [2, 2, 1]]
    assert mtp.measure(partial(CachedModel, model), prompts, 40, Sampling(0.0)).accepted is None
    speed = mtp.measure(partial(SpeculativeModel, model), prompts, 40, Sampling(0.0))
    assert speed.tokens_per_second > 0 and 0 <= speed.accepted <= 1
