"""Credentials in flags and settings are refused before they are written down; in what is recorded they are hidden.

Flags end in the run folder's records, in resolved_config.yaml and the checkpoints, in TensorBoard's file and in batch
scripts, and most of them are handed on with a model.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

# Flags that take a secret, and variables whose values are never recorded. Values that look like a credential or a long
# hash are hidden whatever the name.
SECRET_FLAG = re.compile(
    r"(api|access|auth|private)[-_]?key|secret|password|passwd|credential|(?:^|[-_])pass(?:phrase)?$|"
    # not the tokens of a vocabulary
    r"(?<!bos[-_])(?<!eos[-_])(?<!eod[-_])(?<!pad[-_])(?<!prefix[-_])(?<!middle[-_])(?<!suffix[-_])token$",
    re.IGNORECASE,
)
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH|COOKIE|PRIVATE|SIGNATURE|DSN|WEBHOOK", re.IGNORECASE)
# By their prefixes and lengths, so that folders like /data/hf_models are none: Hugging Face, OpenAI and others of its
# form, GitHub, GitLab, Slack, AWS, Google, W&B, npm and PyPI, JSON web tokens; headers, keys, and NAME=VALUE in a text.
CREDENTIAL = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:hf_|api_org_)[A-Za-z0-9]{26,}|sk-(?:[a-z]+-)?[A-Za-z0-9]{20,}|sk-(?:proj|ant|svcacct)-[\w-]{16,}|"
    r"gh[oprsu]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[a-z]-[\w-]{10,}|A[KS]IA[A-Z0-9]{16}|"
    r"AIza[\w-]{30,}|ya29\.[\w-]{20,}|wandb_v\d_\w{16,}|local-[0-9a-f]{40}|npm_[A-Za-z0-9]{36}|pypi-AgE[\w-]{20,}|"
    r"nvapi-[\w-]{30,}|gsk_[A-Za-z0-9]{30,}|dckr_pat_[\w-]{20,}|xapp-\d-[\w-]{10,}|SG\.[\w-]{16,}\.[\w-]{16,}|"
    r"eyJ[\w-]{8,}\.[\w-]{8,}"
    r")|\bbearer +[\w.+/=-]{16,}|\bauthorization: *\S+ +\S{8,}|-----BEGIN [A-Z ]*PRIVATE KEY-----|"
    r"(?<![a-z/])(?:(?:api|access|auth|secret|private)[-_]?key|token|secret|signature)=[^\s&,;]{6,}|"
    r"(?:password|passwd)=[^\s&,;]{4,}",
    re.IGNORECASE,
)
HASH = re.compile(r"[0-9a-f]{32,}", re.IGNORECASE)
URL_PASSWORD = re.compile(r"(://[^/\s:@]*):[^/\s@]+@")
HIDDEN = "<hidden>"


def redact(text: str) -> str:
    """`text` with everything that looks like a credential hidden."""
    return URL_PASSWORD.sub(rf"\1:{HIDDEN}@", HASH.sub(HIDDEN, CREDENTIAL.sub(HIDDEN, text)))


def redact_command(argv: list[str]) -> list[str]:
    """A command line with the values of secret flags hidden (`--wandb-api-key X`, `--token=X`)."""
    plain, hide = [], False
    for word in argv:
        flag, equals, _ = word.partition("=")
        secret = flag.startswith("--") and bool(SECRET_FLAG.search(flag))
        plain.append(HIDDEN if hide else f"{flag}={HIDDEN}" if secret and equals else redact(word))
        hide = secret and not equals
    return plain


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables with their secrets hidden."""
    return {name: HIDDEN if SECRET_NAME.search(name) else redact(value) for name, value in environment.items()}


def is_secret(name: str, value: str) -> bool:
    """Whether a flag or variable surely holds a credential. A hash does not count: a path may contain one."""
    return bool((value and SECRET_FLAG.search(name)) or CREDENTIAL.search(value) or URL_PASSWORD.search(value))


def refuse(words: Iterable[str], settings: Mapping[str, Any] | None = None) -> None:
    """Raise ValueError for a credential in a command line, or among settings; the error does not repeat it."""
    pairs, name = [(key, str(value)) for key, value in (settings or {}).items()], "the command line"
    for word in words:
        if re.match("--[a-z]", word):
            name, _, word = word.partition("=")
        pairs.append((name, word))
    for name, value in pairs:
        if is_secret(name, value):
            raise ValueError(
                f"{redact(name)} holds a secret, which would be written into the run folder and the checkpoints: "
                "export it as a variable (WANDB_API_KEY, HF_TOKEN, ...) in the shell that starts or submits, or keep "
                "it in the file that its library reads"
            )
