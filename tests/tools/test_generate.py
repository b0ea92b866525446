"""The whole way of a user: train with a tokenizer, export, generate from either folder, evaluate it."""

import importlib.util
import io
import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from support.cli import TINY, TINY_BASELINE, train
from support.tools import start
from tokenizers import Tokenizer, processors

TEXT = (
    "the quick brown fox jumps over the lazy dog; " * 40 + "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich. "
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A run's checkpoints, and the exported model."""
    base = tmp_path_factory.mktemp("whole")
    (base / "corpus.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    tokenizer = base / "tokenizer"
    made = start(
        "train_tokenizer", "--input", str(base / "corpus.jsonl"), "--vocab-size", "300", "--output", str(tokenizer)
    )
    assert made.returncode == 0, made.stderr
    at = TINY.index("--tokenizer-type")
    flags, baseline = ([*model[:at], *model[at + 4 :]] for model in (TINY, TINY_BASELINE))
    named = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)]
    once = ["--train-iters", "1", "--lr-warmup-iters", "0", "--save", str(base / "run"), "--save-interval", "1"]
    train(1, *named, *once, "--mtp-num-layers", "1", base=flags)
    once[once.index("--save") + 1] = str(base / "baseline")
    train(1, *named, *once, base=baseline)
    done = start(
        "convert_checkpoint",
        *("--from", "megatron", "--input", str(base / "run"), "--to", "hf", "--output", str(base / "model")),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(f"{base / 'model'}: logits of ") and "tokens of English text agree" in done.stdout
    return {"run": base / "run", "model": base / "model", "baseline": base / "baseline"}


def generated(folder: Path, *flags: str, text: str = "", said: str = "") -> str:
    done = start("generate", "--load", str(folder), "--max-new-tokens", "12", "--temperature", "0", *flags, text=text)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tokens/s decoded, cache of " in done.stderr and said in done.stderr
    return done.stdout


def test_either_format_and_any_prompt(folders, tmp_path):
    expected = generated(folders["run"], "--prompt", "the lazy fox")
    assert expected.startswith("the lazy fox") and len(expected) > 14
    assert generated(folders["model"], "--prompt", "the lazy fox", "--prefill-piece", "2") == expected
    assert generated(folders["model"], text="the lazy fox") == expected
    (tmp_path / "prompts.txt").write_text("the lazy fox\nquick\n")
    assert generated(folders["model"], "--prompt", "the lazy fox", "--kv-cache-dtype", "int8") == expected
    assert generated(folders["run"], "--prompt", "the lazy fox", "--speculative", said=" drafts accepted") == expected
    batch = generated(folders["model"], "--prompt-file", str(tmp_path / "prompts.txt"))
    assert batch.startswith(expected) and "\nquick" in batch


def test_the_baseline_generates_too(folders):
    text = generated(folders["baseline"], "--prompt", "the lazy fox")
    assert text.startswith("the lazy fox") and len(text) > 14
    refused = start("generate", "--load", str(folders["baseline"]), "--prompt", "a", "--kv-cache-dtype", "fp8")
    assert refused.returncode == 1 and "is a Transformer baseline" in refused.stderr.splitlines()[-1]
    output = str(folders["baseline"].parent / "no")
    flags = ("--from", "megatron", "--input", str(folders["baseline"]), "--to", "hf", "--output", output)
    refused = start("convert_checkpoint", *flags)
    assert refused.returncode == 1 and "only YOCO models can be converted" in refused.stderr.splitlines()[-1]


def test_exported_folder_knows_its_tokenizer(folders):
    config = json.loads((folders["model"] / "config.json").read_text())
    generation = json.loads((folders["model"] / "generation_config.json").read_text())
    assert generation["suppress_tokens"][-1] == config["vocab_size"] - 1
    assert generation["eos_token_id"] == config["eos_token_id"]
    assert (folders["model"] / "tokenizer.json").exists()


@pytest.mark.parametrize("output", ["/proc/x/model", "{model}/config.json/model"])
def test_an_output_that_cannot_be_is_one_error(output, folders):
    output = output.format(**folders)
    done = start("convert_checkpoint", *f"--from megatron --input {folders['run']} --to hf --output {output}".split())
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"convert_checkpoint.py: error: --output {output}: " in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--load", "nowhere", "--prompt", "a"], "--load nowhere: no such folder"),
        (["--prompt", ""], "no token"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature nan must be from 0.001"),
        (["--prompt", "a", "--prompt", "b", "--speculative"], "--speculative continues one prompt, not 2"),
        (["--prompt", "a\udcffb"], r"--prompt 'a\udcffb' is no text"),
        (["--prompt", "a", "--max-new-tokens", "32"], "--max-new-tokens 32: at most 31 fit"),
    ],
)
def test_bad_input(flags, said, folders):
    done = start("generate", "--load", str(folders["model"]), *flags)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert said in done.stderr.splitlines()[-1] and done.stderr.splitlines()[-1].startswith("generate.py: error: ")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prompt", "a", "--prompt-file", "b"], "--prompt and --prompt-file: use only one of them"),
        (["--prompt", "a", "--prefill-piece", "0"], "--prefill-piece 0 must be at least 1"),
        (["--prompt", "a", "--max-new-tokens", "-3"], "--max-new-tokens -3 must be at least 1"),
    ],
)
def test_bad_flags(flags, said):
    done = start("generate", "--load", "nowhere", *flags)
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1]


GENERATE = Path(__file__).parents[2] / "tools/generate.py"
spec = importlib.util.spec_from_file_location("generate", GENERATE)
generate_py = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate_py)


@pytest.mark.parametrize(
    ("content", "said"), [(None, "No such file"), (b"a\xff", "is no text"), (b"", "no prompt"), (b"\n\n", "no prompt")]
)
def test_prompts_that_are_none(content, said, tmp_path, monkeypatch):
    """In a file, and on standard input."""
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
        if content != b"\n\n":
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
            with pytest.raises(ValueError, match=f"standard input .*{said}"):
                generate_py.read_prompts(Namespace(prompt=None, prompt_file=None))
    with pytest.raises(ValueError, match=f"--prompt-file {path}.* {said}"):
        generate_py.read_prompts(Namespace(prompt=None, prompt_file=str(path)))


def test_text_ends_with_the_models_sequences():
    prompts = [[1] * 5, [1] * 20]
    assert generate_py.new_tokens(None, "--prompt", prompts, 4096) == 128
    assert (
        generate_py.new_tokens(None, "--prompt", prompts, 32)
        == generate_py.new_tokens(12, "--prompt", prompts, 32)
        == 12
    )
    for asked in (13, 10**18):
        with pytest.raises(ValueError, match=f"--max-new-tokens {asked}: at most 12 fit"):
            generate_py.new_tokens(asked, "--prompt", prompts, 32)
    with pytest.raises(ValueError, match="--prompt-file x has 20 tokens, but the model's sequences end at 20"):
        generate_py.new_tokens(None, "--prompt-file x", prompts, 20)


def begin_texts(tokenizer: Path, token: str) -> None:
    """Give a tokenizer a token of its own before every text."""
    stored = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    stored.add_special_tokens([token])
    ids = [(token, stored.token_to_id(token))]
    stored.post_processor = processors.TemplateProcessing(single=[token, "$A"], special_tokens=ids)
    stored.save(str(tokenizer / "tokenizer.json"))


def test_bytes_are_tokens_all_the_way(tmp_path):
    """The tokenizer of bytes, which begins texts with a token: preprocessing, training on its data, generation, and the
    exported model with it. The tokenizer itself is gone once the run has its copy."""
    tokenizer, prefix = tmp_path / "bytes", tmp_path / "d"
    made = start("train_tokenizer", "--bytes", "--output", str(tokenizer))
    assert made.returncode == 0, made.stderr
    begin_texts(tokenizer, "<|begin|>")
    named = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)]
    (tmp_path / "corpus.jsonl").write_text((json.dumps({"text": TEXT}) + "\n") * 9)
    flags = ["--input", str(tmp_path / "corpus.jsonl"), "--output-prefix", str(prefix), "--append-eod"]
    done = start("preprocess_data", *flags, *named)
    assert done.returncode == 0, done.stderr
    data = np.fromfile(f"{prefix}_text_document.bin", np.uint16)
    assert data.tolist() == [258, *TEXT.encode(), 256] * 9

    at = TINY.index("--mock-data")
    flags = [*TINY[:at], *TINY[at + 7 :], *named, "--data-path", f"{prefix}_text_document", "--split", "1,0,0"]
    once = ["--train-iters", "1", "--lr-warmup-iters", "0", "--save", str(tmp_path / "run"), "--save-interval", "1"]
    train(1, *once, "--eval-iters", "0", "--dataloader-inter-document-masking", "--eod-mask-loss", base=flags)
    assert json.loads((tmp_path / "run/data.json").read_text())["document_start"] == [258]
    (tmp_path / "run").rename(tmp_path / "moved")
    tokenizer.rename(tmp_path / "elsewhere")
    model = tmp_path / "model"
    flags = ("--from", "megatron", "--input", str(tmp_path / "moved"), "--to", "hf", "--output", str(model))
    done = start("convert_checkpoint", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((model / "generation_config.json").read_text())["bos_token_id"] == 258
    expected = generated(tmp_path / "moved", "--prompt", "größer", said="9 prompt tokens")
    assert expected.startswith("größer")
    assert generated(model, "--prompt", "größer", said="9 prompt tokens") == expected

    # Its data may do without what its tokenizer's template has: then so do generation and export.
    record = json.loads((tmp_path / "moved/data.json").read_text()) | {"document_start": []}
    (tmp_path / "moved/data.json").write_text(json.dumps(record))
    generated(tmp_path / "moved", "--prompt", "größer", said="8 prompt tokens")
    generated(
        tmp_path / "moved", "--prompt", "größer", "--tokenizer", str(tmp_path / "elsewhere"), said="8 prompt tokens"
    )


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """Losses on a text, which every model has."""
    (tmp_path / "text.txt").write_text(TEXT[:200])
    task = {"task": "loss_by_position", "data": str(tmp_path / "text.txt"), "length": 20}
    (tmp_path / "losses.yaml").write_text(json.dumps({"tasks": [task]}))
    return tmp_path / "losses.yaml"


def evaluated(suite: Path, *flags: object) -> tuple[dict, str]:
    """(results.json, what the tool printed)."""
    done = start("evaluate", "--suite", suite, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(Path(done.stdout.splitlines()[-1]).read_text()), done.stdout + done.stderr


def test_either_format_is_evaluated_alike(folders, suite, tmp_path):
    run, printed = evaluated(suite, "--load", folders["run"], "--output", tmp_path / "run")
    model, _ = evaluated(suite, "--hf", folders["model"], "--output", tmp_path / "model")
    assert run["model"]["iteration"] == 1 and model["model"]["iteration"] is None
    metrics = run["tasks"]["loss_by_position"]["metrics"]
    assert model["tasks"]["loss_by_position"]["metrics"] == pytest.approx(metrics, rel=1e-5)
    assert f"loss_by_position           loss  {metrics['loss']:.4f}" in printed
    assert "requests in" in printed
    again = evaluated(suite, "--load", folders["run"], "--output", tmp_path / "run")
    assert again[0] == run and "requests in" not in again[1]


def test_the_baseline_is_evaluated(folders, suite):
    results, _ = evaluated(suite, "--load", folders["baseline"])
    assert 0 < results["tasks"]["loss_by_position"]["metrics"]["loss"] < 20
    assert (folders["baseline"] / "evaluation/losses/iter_0000001/results.json").exists()


@pytest.mark.parametrize("what", ["suite", "task", "length", "model", "iteration", "hf", "other"])
def test_bad_evaluations_are_one_error(folders, suite, tmp_path, what):
    flags: dict[str, object] = {"--load": folders["run"], "--suite": suite, "--output": tmp_path / "out"}
    if what in ("task", "length"):
        before, after = {"task": ("loss_by_position", "los_by_position"), "length": ('"length": 20', '"length": 99')}[
            what
        ]
        suite.write_text(suite.read_text().replace(before, after))
    elif what == "hf":
        flags["--hf"] = flags.pop("--load")
    elif what == "other":
        evaluated(suite, "--load", folders["run"], "--output", tmp_path / "out")
        flags["--limit"] = 1
    else:
        flags |= {"suite": {"--suite": "none.yaml"}, "model": {"--load": tmp_path}}.get(what, {"--iteration": 7})
    done = start("evaluate", *(word for flag in flags.items() for word in flag))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("evaluate.py: error: ")
    expected = {
        "suite": "none.yaml is missing",
        "task": "did you mean loss_by_position?",
        "length": "sequences of 45 tokens, but the model's end at",
        "model": "holds neither a run's checkpoints",
        "iteration": "iter_0000007 is no folder",
        "hf": "holds no exported model",
        "other": "is of settings with another requests_at_most",
    }
    assert expected[what] in line
