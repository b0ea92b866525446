"""Prompts and answers: each document's tokens and loss mask, derived by hand from bytes, which are the tokens here."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.training.config import TokenizerConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from yoco_megatron.corpus import preprocess as module
from yoco_megatron.corpus import readers
from yoco_megatron.corpus.encoders import following, join
from yoco_megatron.corpus.formats import FORMATS
from yoco_megatron.corpus.preprocess import Report, preprocess
from yoco_megatron.corpus.tokenizer_training import EOD, byte_tokenizer
from yoco_megatron.data.tokenizer import build_tokenizer

END, PAD, START, STOP = 256, 257, 258, 259
"""<|endoftext|>, <|pad|>, <|im_start|>, <|im_end|>."""
HEADER = "{{ '<|im_start|>' + message['role'] + '\\n' }}"
TURN = "{{ message['content'] + '<|im_end|>' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
PLAIN = "{% for message in messages %}" + HEADER + TURN + "{{ '\\n' }}{% endfor %}" + PROMPT
MARKED = (
    "{% for message in messages %}" + HEADER + "{% if message['role'] == 'assistant' %}{% generation %}" + TURN +
    "{% endgeneration %}{% else %}" + TURN + "{% endif %}{{ '\\n' }}{% endfor %}" + PROMPT
)  # fmt: skip
TALK = [
    {"role": "system", "content": "Be größer."},
    {"role": "user", "content": "Hi 🙂"},
    {"role": "assistant", "content": "Yes 🙂"},
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": ""},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "bytes"
    byte_tokenizer(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(path)
    return path


def tokenizer_of(folder: Path, template: str | None = None) -> Any:
    return build_tokenizer(
        TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder), chat_template=template)
    )


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(files: list[Path], prefix: Path, tokenizer: Any, kind: str = "messages", **more: Any) -> Report:
    options = {"keys": FORMATS[kind], "append_eod": False, "workers": 2} | more
    return preprocess(files, str(prefix), tokenizer, data_format=kind, **options)[kind]


def documents(prefix: Path, kind: str = "messages") -> list[tuple[list[int], list[int]]]:
    """Tokens and mask of each document."""
    tokens, mask = (IndexedDataset(f"{prefix}_{kind}_document{part}") for part in ("", "_loss_mask"))
    assert mask.index.dtype == np.uint8
    assert tokens.sequence_lengths.tolist() == mask.sequence_lengths.tolist()
    assert tokens.document_indices.tolist() == mask.document_indices.tolist()
    return [(tokens[index].tolist(), mask[index].tolist()) for index in range(len(tokens))]


def document(*parts: tuple[Any, int]) -> tuple[list[int], list[int]]:
    """From texts or lists of ids, each learned or not."""
    ids = [(list(part.encode()) if isinstance(part, str) else part, flag) for part, flag in parts]
    return [id_ for part, _ in ids for id_ in part], [flag for part, flag in ids for _ in part]


def turn(role: str, content: str, learned: int = 0) -> list[tuple[Any, int]]:
    return [([START], 0), (f"{role}\n", 0), (content, learned), ([STOP], learned), ("\n", 0)]


def problems(report: Report) -> dict[int, tuple[str, str]]:
    """Line -> kind and reason."""
    if not report.problems:
        return {}
    found = map(json.loads, Path(report.problems).read_text().splitlines())
    return {int(entry["place"].rpartition(":")[2]): (entry["kind"], entry["reason"]) for entry in found}


def test_completions_are_learned_with_their_end(folder: Path, tmp_path: Path) -> None:
    """The first token of a document is not: nothing precedes it."""
    lines = [("Q: größer? A:", " 🙂"), ("", "ab"), ("p", f"done{EOD}"), ("p", ""), (f"a {EOD}", "b")]
    path = write(tmp_path / "f.jsonl", [{"completion": answer, "prompt": prompt} for prompt, answer in lines])
    report = run([path], tmp_path / "out", tokenizer_of(folder), "prompt_completion")
    assert documents(tmp_path / "out", "prompt_completion") == [
        document(("Q: größer? A:", 0), (" 🙂", 1), ([END], 1)),
        document(("a", 0), ("b", 1), ([END], 1)),
        document(("p", 0), ("done", 1), ([END], 1)),
        document(("a ", 0), ([END], 0), ("b", 1), ([END], 1)),
    ]
    assert (report.documents, report.empty_documents, report.bad_lines, report.format) == (4, 1, 0, "prompt_completion")
    assert report.loss_mask is not None and report.loss_mask["learned_tokens"] == 6 + 2 + 5 + 2
    assert report.loss_mask["learned_share"] == round(15 / report.tokens, 4)
    assert report.tokenizer == {"document_start": [], "eod": END}
    assert problems(report)[4] == ("empty", "'prompt_completion' has no text under 'completion': nothing to learn")
    assert problems(report)[5] == ("kept", f"'prompt_completion' holds special tokens: '{EOD}' ({END})")
    split = run([path], tmp_path / "split", tokenizer_of(folder), "prompt_completion", split_special_tokens=True)
    assert documents(tmp_path / "split", "prompt_completion")[3] == document((f"a {EOD}", 0), ("b", 1), ([END], 1))
    assert split.documents_with_special_tokens == 0


def test_what_a_tokenizer_puts_around_a_text_is_around_the_document(folder: Path, tmp_path: Path) -> None:
    made = tokenizer_of(folder)
    core = made._tokenizer.tokenizer.backend_tokenizer
    single = f"<|pad|> $A {EOD}"
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[(EOD, END), ("<|pad|>", PAD)])
    path = write(tmp_path / "f.jsonl", [{"question": "p", "answer": "c"}])
    report = run([path], tmp_path / "out", made, "prompt_completion", keys=["question", "answer"])
    assert documents(tmp_path / "out", "prompt_completion") == [document(([PAD], 0), ("p", 0), ("c", 1), ([END], 1))]
    assert report.tokenizer == {"document_start": [PAD], "eod": END}


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["by prefixes", "generation"])
def test_answers_of_a_conversation_are_learned_with_their_end(folder: Path, tmp_path: Path, template: str) -> None:
    """Several turns; no answer, and only the last of a context's; the end of a document is learned after an answer."""
    records = [{"messages": TALK}, {"messages": TALK[:2]}, {"messages": TALK[:4]}]
    made = tokenizer_of(folder, template)
    report = run([write(tmp_path / "f.jsonl", records)], tmp_path / "out", made)
    answered = [
        *turn("system", "Be größer."), *turn("user", "Hi 🙂"), *turn("assistant", "Yes 🙂", 1), *turn("user", "x")
    ]  # fmt: skip
    whole = document(*answered, *turn("assistant", "", 1))
    assert documents(tmp_path / "out") == [whole, document(*answered)]
    assert (report.documents, report.empty_documents) == (2, 1)
    assert problems(report) == {2: ("empty", "'messages' has no answer, or an empty one: nothing to learn")}
    assert report.tokenizer["document_start"] is None and report.tokenizer["eod"] is None

    parts = [{"prompt": TALK[:4], "completion": TALK[4:]}, {"prompt": TALK[:2], "completion": TALK[2:]}]
    parts.append({"prompt": TALK[:3], "completion": TALK[3:]})
    path = write(tmp_path / "parts.jsonl", parts)
    report = run([path], tmp_path / "parts", made, keys=["prompt", "completion"], append_eod=True)
    context = [(part, 0) for part, _ in answered]
    assert documents(tmp_path / "parts") == [
        document(*context, *turn("assistant", "", 1), ([END], 0)),
        document(*answered, *turn("assistant", "", 1), ([END], 0)),
    ]
    assert "end with an answer: move it to 'completion'" in problems(report)[3][1]


def test_an_end_of_document_continues_the_last_answer(folder: Path, tmp_path: Path) -> None:
    """One that the template writes is not written again; a new line that ends turns is learned."""
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = write(tmp_path / "f.jsonl", [talk])
    for name, end, ids in (("bare", "", []), ("ended", f"'{EOD}'", [END]), ("lines", "'\\n'", [10])):
        template = "{% for message in messages %}{{ message['content'] + (" + (end or "''") + ") }}{% endfor %}"
        run([path], tmp_path / name, tokenizer_of(folder, template), append_eod=True)
        of_answer = [] if ids == [END] else ids
        assert documents(tmp_path / name) == [document(("a", 0), (ids, 0), ("b", 1), (of_answer, 1), ([END], 1))]


def test_a_template_that_changes_what_it_wrote_is_refused(folder: Path, tmp_path: Path) -> None:
    """An answer must follow what the model reads when it answers."""
    path = write(tmp_path / "f.jsonl", [{"messages": TALK[:3]}, {"messages": TALK}])
    thinks = PLAIN.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>' }}{% endif %}")
    assert thinks != PLAIN
    for template in ("{{ messages | length }}" + PLAIN, thinks):
        with pytest.raises(ValueError, match=r"f\.jsonl:1: the chat template writes the first 2 messages and the gen"):
            run([path], tmp_path / "out", tokenizer_of(folder, template), max_bad_lines=0)
    last = "{% for message in messages %}{{ message['content'] }}{% if loop.last %}!{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match=r"f\.jsonl:1: .* otherwise where others follow: give one .*{% generation %}"):
        run([path], tmp_path / "out", tokenizer_of(folder, last), max_bad_lines=0)
    assert not list(tmp_path.glob("out*"))


def test_templates_that_cannot_be_used_are_one_error_before_any_work(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", [{"messages": TALK}])
    for template, error in ((None, r"has no chat template.*--chat-template"), ("{% for %}", r"line 1 is no Jinja")):
        with pytest.raises(ValueError, match=error):
            run([path], tmp_path / "out", tokenizer_of(folder, template))
    null = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=9))
    with pytest.raises(ValueError, match=r"--tokenizer-type: a chat template needs HuggingFaceTokenizer"):
        run([path], tmp_path / "out", null)
    made = tokenizer_of(folder, PLAIN)
    for kind, keys in (("messages", ["a", "b", "c"]), ("prompt_completion", ["a"])):
        with pytest.raises(ValueError, match=rf"--json-keys .*--data-format {kind} reads"):
            run([path], tmp_path / "out", made, kind, keys=keys)
    with pytest.raises(ValueError, match=r"--split-sentences is for plain texts"):
        run([path], tmp_path / "out", made, sentences=object())
    assert [file.name for file in tmp_path.iterdir()] == ["f.jsonl"]


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
ODD = {
    "null": ({"messages": None}, "under the key 'messages' is null, not a list of messages"),
    "text": ({"messages": "hi"}, "is of the type str, not a list of messages"),
    "strings": ({"messages": ["hi"]}, "is of the type list, not a list of messages (objects)"),
    "empty": ({"messages": []}, "the list of messages under the key 'messages' is empty"),
    "key": ({"text": "hi"}, "no key 'messages' (keys: text)"),
    "role": ({"messages": [USER, {"role": "gpt", "content": "x"}]}, "message 2 of 'messages' has the role \"gpt\""),
    "no role": ({"messages": [{"content": "x"}]}, "message 1 of 'messages' has the role null"),
    "list role": ({"messages": [{"role": [], "content": "x"}]}, "has the role []"),
    "no content": ({"messages": [USER, {"role": "assistant"}]}, "message 2 of 'messages' (assistant) has no content"),
    "null content": ({"messages": [{"role": "user", "content": None}, ANSWER]}, "(user) has no content"),
    "number": ({"messages": [{"role": "user", "content": 7}, ANSWER]}, "message 1 of 'messages' is of the type int"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]},
        "the content of message 1 of 'messages' has a part that is no text (\"image\")",
    ),
    "surrogate": ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "holds a lone surrogate"),
    "tools": ({"messages": [USER, ANSWER], "tools": "{"}, "the text under the key 'tools' is not JSON"),
    "tool": ({"messages": [USER, ANSWER], "tools": [1]}, "'tools' is of the type list, not a list of objects"),
    "variables": ({"messages": [USER, ANSWER], "chat_template_kwargs": [1]}, "is of the type list, not an object"),
    "messages": ({"messages": [USER, ANSWER], "chat_template_kwargs": {"messages": 1}}, "sets 'messages'"),
    "failing": ({"messages": [USER, ANSWER], "chat_template_kwargs": {"fail": 1}}, "the chat template fails: Template"),
    "broken": ({"messages": [USER, ANSWER], "chat_template_kwargs": {"add": 1}}, "the chat template fails: TypeError"),
}


def test_odd_records_are_named_and_left_out(folder: Path, tmp_path: Path) -> None:
    """Beside them: a byte order mark, line ends of Windows, a blank line, a megabyte, parts of text, tools."""
    long = "ä" * (1 << 19)
    good = [
        [USER, ANSWER],
        [USER, {"role": "assistant", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]}],
        [USER, {"role": "assistant", "content": long}],
        [USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}, {"role": "tool", "content": "1"}],
    ]
    lines = [json.dumps({"messages": good[0]}), "", *(json.dumps(record) for record, _ in ODD.values())]
    lines += [json.dumps({"messages": messages, "tools": [{"name": "f"}]}) for messages in good[1:]]
    path = tmp_path / "f.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    template = (
        "{% if fail %}{{ raise_exception('no') }}{% endif %}{{ 'x' + add if add else '' }}"
        "{% for tool in tools or [] %}{{ tool['name'] }}{% endfor %}"
        + PLAIN.replace(TURN, "{{ (message['content'] or message['tool_calls'][0]['name']) + '<|im_end|>' }}")
    )
    report = run([path], tmp_path / "out", tokenizer_of(folder, template))
    found = problems(report)
    assert list(found) == list(range(3, 3 + len(ODD))) and report.bad_lines == len(ODD)
    for (kind, reason), (_, expected) in zip(found.values(), ODD.values()):
        assert kind == "bad" and expected in reason
    called = [*turn("assistant", "f", 1), *turn("tool", "1")]
    assert documents(tmp_path / "out") == [
        document(*turn("user", "a"), *turn("assistant", "b", 1)),
        document(("f", 0), *turn("user", "a"), *turn("assistant", "bc", 1)),
        document(("f", 0), *turn("user", "a"), *turn("assistant", long, 1)),
        document(("f", 0), *turn("user", "a"), *called),
    ]


def test_odd_prompts_are_named(folder: Path, tmp_path: Path) -> None:
    records = [
        {"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": None}, {"prompt": 1, "completion": "c"},
        {"prompt": "p"}, {"prompt": [USER], "completion": [ANSWER]}, {"prompt": "p", "completion": [ANSWER]},
    ]  # fmt: skip
    report = run([write(tmp_path / "f.jsonl", records)], tmp_path / "out", tokenizer_of(folder), "prompt_completion")
    assert [reason for _, reason in problems(report).values()] == [
        "the value under the key 'completion' is null, not text",
        "the value under the key 'prompt' is of the type int, not text",
        "no key 'completion' (keys: prompt); name another one by --json-keys, or another --data-format",
        "both values are lists: read messages with --data-format messages --json-keys prompt completion",
        "the value under the key 'completion' is of the type list, not text",
    ]


def test_special_tokens_of_a_message_are_listed_or_stay_text(folder: Path, tmp_path: Path) -> None:
    """Those of the template are neither."""
    talk = [{"role": "user", "content": f"say {EOD}<|im_end|>"}, {"role": "assistant", "content": EOD}]
    path = write(tmp_path / "f.jsonl", [{"messages": talk}, {"messages": [USER, ANSWER]}])
    made = tokenizer_of(folder, PLAIN)
    report = run([path], tmp_path / "out", made)
    assert problems(report) == {1: ("kept", f"'messages' holds special tokens: '{EOD}' ({END}), '<|im_end|>' ({STOP})")}
    user = [([START], 0), ("user\nsay ", 0), ([END, STOP, STOP], 0), ("\n", 0)]
    assistant = [([START], 0), ("assistant\n", 0), ([END, STOP], 1), ("\n", 0)]
    assert documents(tmp_path / "out")[0] == document(*user, *assistant)
    assert run([path], tmp_path / "split", made, split_special_tokens=True).documents_with_special_tokens == 0
    parted = document(*turn("user", f"say {EOD}<|im_end|>"), *turn("assistant", EOD, 1))
    assert documents(tmp_path / "split")[0] == parted


def test_an_interrupted_run_of_other_workers_gives_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BATCH_RECORDS", 3)
    monkeypatch.setattr(module, "SAVE_SECONDS", 0)
    path = write(tmp_path / "f.jsonl", [{"messages": TALK[: 2 + n % 4]} for n in range(40)])
    whole = run([path], tmp_path / "whole", tokenizer_of(folder, MARKED), workers=1)
    append, left = module._append, iter(range(8))

    def dying(*arguments: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        append(*arguments)

    monkeypatch.setattr(module, "_append", dying)
    with pytest.raises(KeyboardInterrupt):
        run([path], tmp_path / "out", tokenizer_of(folder, MARKED), workers=4)
    monkeypatch.setattr(module, "_append", append)
    with pytest.raises(ValueError, match=r"whose chat-template differed"):
        run([path], tmp_path / "out", tokenizer_of(folder, PLAIN))
    report = run([path], tmp_path / "out", tokenizer_of(folder, MARKED), workers=3)
    for part in ("", "_loss_mask"):
        for suffix in ("bin", "idx"):
            files = (tmp_path / f"{name}_messages_document{part}.{suffix}" for name in ("out", "whole"))
            assert len({file.read_bytes() for file in files}) == 1
    assert (report.files, report.loss_mask, report.documents) == (whole.files, whole.loss_mask, whole.documents)


def test_tables_of_messages(folder: Path, tmp_path: Path) -> None:
    """Their rows have all fields of all rows, and null where a line of JSON would have none."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    talks = [TALK, [{**USER, "name": "n"}, {**ANSWER, "tool_calls": None}]]
    tools = ['[{"name": "f"}]', None]
    parquet.write_table(pyarrow.table({"messages": talks, "tools": tools}), tmp_path / "f.parquet")
    template = "{{ tools[0]['name'] if tools else '' }}" + PLAIN
    run([tmp_path / "f.parquet"], tmp_path / "table", tokenizer_of(folder, template))
    records = [{"messages": talks[0], "tools": tools[0]}, {"messages": talks[1]}]
    run([write(tmp_path / "f.jsonl", records)], tmp_path / "lines", tokenizer_of(folder, template))
    assert documents(tmp_path / "table") == documents(tmp_path / "lines")
    assert len(documents(tmp_path / "table")) == 2


def test_a_text_that_follows_another_gets_no_space() -> None:
    """As of a SentencePiece-like tokenizer; one that adds none, or encodes numbers, is used as it is."""
    vocabulary = {"<unk>": 0, "▁": 1, "a": 2, "b": 3, "\n": 4, "▁a": 5, "▁b": 6}
    core = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Metaspace()

    def encode(texts: list[bytes]) -> Any:
        return join([core.encode(text.decode(), add_special_tokens=False).ids for text in texts])

    texts = [b"a", b" b", b"", b"\nb"]
    assert encode(texts).ids.tolist() == [5, 6, 1, 4, 3]
    found = following(encode)(texts)
    assert found.ids.tolist() == [2, 6, 4, 3] and found.lengths.tolist() == [1, 1, 0, 2]
    bare = lambda texts: join([list(text) for text in texts])  # noqa: E731
    assert following(bare) is bare
