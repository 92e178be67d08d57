"""The page kit: numbers as text, training curves, what a template makes of text and drawings."""

import jinja2
import pytest
from markupsafe import Markup

from rewardlib.report import page

TEMPLATE = """{% extends "base.html" %}
{% import "macros.html" as kit with context %}
{% block sections %}
{% call kit.section("Two words") %}
{% call kit.table(["", about], [about]) %}
{{ kit.rows([[about, about]]) }}
{% endcall %}
{% call kit.facts() %}{{ kit.fact(about, about) }}{% endcall %}
{% call kit.figures() %}
{{ kit.figure(about, drawing) }}{{ kit.figure("left out", none) }}
{% endcall %}
{% endcall %}
{% endblock %}
"""


def test_numbers():
    texts = [page.number(value) for value in (-0.0004, -0.0006, 1.23449, None, 1234)]
    assert texts == ["0.000", "−0.001", "1.234", "—", "1234.000"]
    assert [page.number(x, "+") for x in (0.0004, 0.5, -0.5)] == ["0.000", "+0.500", "−0.500"]
    p_values = [page.p_value(p) for p in (0.0005, 0.001, 0.9735, None)]
    assert p_values == ["p < 0.001", "p = 0.001", "p = 0.974", ""]
    assert page.interval([None, None]) == page.interval(None) == ""


def test_settings_in_words():
    values = (True, False, None, 1e-3, 7, "x", [1024, 512], [])
    words = ["yes", "no", "not set", "0.001", "7", "x", "1024 512", "none"]
    assert [page.plain(value) for value in values] == words


def test_curves_of_one_epoch_and_of_no_validation_pairs():
    log = [{"epoch": 1, "train_loss": 0.5, "best": True}]
    assert page.training_curves("loss", [log], "validation_loss", "#000000", "loss") is None
    drawing = page.training_curves("loss", [log], "train_loss", "#000000", "loss")
    assert "best epoch" in drawing.elements


def test_text_is_escaped_and_drawings_are_not(tmp_path):
    (tmp_path / "page.html").write_text(TEMPLATE)
    drawing = page.Drawing("<label>", "0 0 1 1", Markup("<g></g>"))
    content = {"about": "<a> & 'b'", "summary": "<summary>", "drawing": drawing}
    html = page.render(tmp_path / "page.html", content)
    assert html.count("&lt;a&gt; &amp; &#39;b&#39;") == 7
    assert "<a>" not in html and "<summary>" not in html and "<label>" not in html
    assert html.count("<g></g>") == html.count("<svg") == html.count("<figure>") == 1
    assert '<a href="#two-words">Two words</a>' in html and '<section id="two-words">' in html


def test_a_value_that_is_missing_is_an_error(tmp_path):
    (tmp_path / "page.html").write_text('{% extends "base.html" %}')
    with pytest.raises(jinja2.UndefinedError, match="'summary' is undefined"):
        page.render(tmp_path / "page.html", {})
