"""What the benchmark of packed answers counts, by hand."""

import torch
from packed_answers import Pack


def test_documents_of_tokens() -> None:
    pack = Pack(((0, 4), (4, 7)), (), torch.zeros(1, 8))
    assert pack.document_ids.tolist() == [[0, 0, 0, 0, 1, 1, 1]]


def test_a_third_are_answers_within_documents() -> None:
    pack = Pack.random(1000, (90, 120), 2)
    assert pack.documents[0][0] == 0 and pack.documents[-1][1] == 1000
    starts = {start for start, _ in pack.documents}
    assert all(stop - 1 not in starts for _, stop in pack.answers)
    assert not any(start < edge < stop for start, stop in pack.answers for edge in starts)
    assert 0.28 < sum(stop - start for start, stop in pack.answers) / 1000 < 0.34
