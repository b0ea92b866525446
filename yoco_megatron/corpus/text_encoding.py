"""Tells UTF-16 and UTF-32 from UTF-8, with or without a byte order mark. All text is read as UTF-8.

ASCII characters in UTF-16 are valid UTF-8, with a NUL beside each: unnoticed, they would be learned like that.
"""

import codecs

import numpy as np

# The mark of UTF-32 begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# Of four bytes, those that are control characters in most letters of most scripts, and those that are in few.
PATTERNS = {
    "UTF-32LE": ((2, 3), (0,)),
    "UTF-32BE": ((0, 1), (3,)),
    "UTF-16LE": ((1, 3), (0, 2)),
    "UTF-16BE": ((0, 2), (1, 3)),
}
# NUL beside Latin letters, 4 beside Cyrillic ones; hardly ever in a text.
CONTROL = bytes(byte for byte in range(32) if byte not in b"\t\n\f\r")
OTHERS = bytes(byte for byte in range(256) if byte not in CONTROL)
MANY, TIMES = 0.3, 1.5
# Bytes of a text that are looked at.
HEAD = 4096


def foreign_encoding(text: bytes) -> str | None:
    """The encoding, by its iconv name, of a text that begins as UTF-16 or UTF-32 does; None for any other."""
    for mark, name in MARKS.items():
        if text.startswith(mark):
            return name
    head = text[: min(len(text), HEAD) // 4 * 4]
    if not head.translate(None, OTHERS):
        return None
    shares = np.isin(np.frombuffer(head, np.uint8), list(CONTROL)).reshape(-1, 4).mean(axis=0)
    for name, (control, other) in PATTERNS.items():
        if shares[list(control)].min() > max(MANY, TIMES * shares[list(other)].max()):
            return name
    return None


def refuse(name: str) -> str:
    """What is wrong with such a text, and the fix, for an error that names the place."""
    return f"it is {name} text, and UTF-8 is read: iconv -f {name} -t UTF-8 FILE > NEW"
