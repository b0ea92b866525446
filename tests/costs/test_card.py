"""Files of cards: the shipped ones, and what is wrong in others."""

from pathlib import Path

import pytest

from yoco_megatron.costs.card import H100, SHIPPED, Card, Link
from yoco_megatron.costs.gpu_peak import TFLOPS


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_cards(name):
    card = Card.of(name)
    assert card.name == name.upper() and card.peak_tflops == TFLOPS[card.name]
    assert card.linear_tflops < card.linear_fp8_tflops < 2 * card.peak_tflops


def test_links_inside_and_between_nodes():
    assert H100.link(8) == Link(H100.node_gb_per_s * 1e9, H100.node_latency_us * 1e-6)
    assert H100.link(9).bytes_per_second == H100.network_gb_per_s * 1e9
    assert H100.link(8).seconds(280e9) == pytest.approx(1 + 12e-6)


@pytest.mark.parametrize(
    ("was", "becomes", "message"),
    [
        ("watts: 700.0", "", "watts is missing"),
        ("watts: 700.0", "watts: 700.0\nwats: 1", "no figure 'wats'; did you mean watts?"),
        ("watts: 700.0", "watts: -1", "watts -1 is no positive number"),
        ("watts: 700.0", "watts: .nan", "watts nan is no positive number"),
        ("watts: 700.0", "watts: much", "yaml: watts is 'much', not float"),
        ("4096: 338.0", "long: 338.0", r"attention_tflops: write {tokens: TFLOP/s, ...}"),
        ("4096: 338.0", "4096: 0", "attention_tflops 0 is no positive number"),
        ("4096: 338.0", "0: 338.0", r"attention_tflops: write {tokens: TFLOP/s, ...}"),
        ("gated_retention: 100.0", "retention: 1.0", "no mixer 'retention'; did you mean gated_retention?"),
        ("name: H100", "- H100", "not valid YAML"),
    ],
)
def test_bad_files_are_one_error(tmp_path: Path, was: str, becomes: str, message: str):
    text = SHIPPED["h100"].read_text()
    assert was in text
    path = tmp_path / "card.yaml"
    path.write_text(text.replace(was, becomes))
    with pytest.raises(ValueError, match=message) as error:
        Card.of(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_card_that_is_nowhere():
    with pytest.raises(ValueError, match="--card nowhere is missing: give one of h100, h200 or the file of a card"):
        Card.of("nowhere")
