"""The page: whole, self-contained, and honest about what the numbers allow."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup

from moco.comparison.made_up import Record, diverged_record, made_up_record, made_up_records
from shuffle_batchnorm.moco.comparison import report
from shuffle_batchnorm.moco.comparison.report import template, write_report
from shuffle_batchnorm.moco.comparison.summary import ResultsError
from shuffle_batchnorm.moco.comparison.tables import IN_BATCH

VOID = {"meta", "img", "br"}
OLD = Path(__file__).parents[1] / "old_runs" / "results.json"


class Page(HTMLParser):
    """Reads a page and insists that every element is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.cells: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open[-1:] in (["td"], ["b"]) and data.strip():
            self.cells.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures have tests of their own, and take seconds."""
    monkeypatch.setattr(report, "save_figures", lambda *_: {})
    monkeypatch.setattr(report, "pictures", lambda *_: {"leak": Markup("<svg></svg>")})


def written(output: Path, records: list[Record], **options: Any) -> Page:
    return Page(write_report(output, records, command="the command", **options).read_text("utf-8"))


def ids(page: Page) -> list[str]:
    return [value for _, name, value in page.attributes if name == "id"]


def test_page_is_whole_and_holds_its_figures(tmp_path: Path) -> None:
    """Catches ids of one figure that hide another's, which a browser draws without a word."""
    page = written(tmp_path, made_up_records(("local",), range(1)))
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert labels == [report.LABELS[name] for name in ("leak", "leak", "curves", "curves")]
    assert max(Counter(ids(page)).values()) == 1
    used = {value for tag, name, value in page.attributes if (tag, name) == ("use", "href")}
    assert {value.removeprefix("#") for value in used} <= set(ids(page))
    assert sorted(path.name for path in (tmp_path / "figures").glob("*.png")) == [
        "curves.png",
        "leak.png",
        "leak_and_cure.png",
    ]


@pytest.mark.usefixtures("without_figures")
def test_page_asks_nothing_of_the_network(tmp_path: Path) -> None:
    page = written(tmp_path, made_up_records())
    assert not {tag for tag, _, _ in page.attributes} & {"link", "iframe", "img"}
    assert not {name for _, name, _ in page.attributes} & {"src", "srcset"}
    links = {value for _, name, value in page.attributes if name == "href"}
    assert {link for link in links if ":" in link} == {"https://arxiv.org/abs/1911.05722"}
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "@import" not in text
    assert "url(" not in text
    for link in links:  # its files lie beside it
        assert ":" in link or link == "figures/" or (tmp_path / link).is_file(), link


@pytest.mark.usefixtures("without_figures")
def test_what_is_to_be_copied_is_what_the_files_hold(tmp_path: Path) -> None:
    page = written(tmp_path, made_up_records())
    for name in ("table.tex", "references.bib"):
        assert " ".join((tmp_path / name).read_text("utf-8").split()) in page.text
    assert json.loads((tmp_path / "results.json").read_text()) == made_up_records()


@pytest.mark.usefixtures("without_figures")
def test_a_keyboard_reaches_what_scrolls_and_is_told_what_it_is(tmp_path: Path) -> None:
    page = written(tmp_path, made_up_records())
    regions = page.attributes.count(("div", "role", "region"))
    assert regions == page.attributes.count(("div", "class", "scroll")) == 2
    assert page.attributes.count(("div", "tabindex", "0")) == regions
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("div", "aria-label")]
    assert labels == [
        "Results, a table that scrolls sideways",
        "All runs, a table that scrolls sideways",
    ]


@pytest.mark.usefixtures("without_figures")
def test_records_of_earlier_versions_still_make_a_page(tmp_path: Path) -> None:
    page = written(tmp_path, json.loads(OLD.read_text()))
    assert page.cells.count("unknown: the records do not say") == 6


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_and_figures_stand_out_from_the_page(scheme: str) -> None:
    """At least 4.5 to 1 for words, and in the dark, where colours are ours to choose, 4 to 1."""
    light, dark, *_ = template("page.css").render().split("@media")
    found = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light if scheme == "light" else dark))

    def contrast(one: str, other: str) -> float:
        low, high = sorted(luminance(found[name]) for name in (one, other))
        return (high + 0.05) / (low + 0.05)

    for word in ("ink", "soft", "link"):
        assert contrast(word, "paper") >= 4.5, word
        assert contrast(word, "shade") >= 4.5, word
    drawn = {name for name in found if re.fullmatch(r"c[0-9a-f]{6}", name)}
    assert (scheme == "dark") == bool(drawn)
    for colour in drawn - {"cffffff", "ce3e5e8"}:  # the ground itself, and a grid
        assert contrast(colour, "paper") >= 4, colour


@pytest.mark.usefixtures("without_figures")
def test_page_says_what_the_table_says(tmp_path: Path) -> None:
    runs = made_up_records(diverged={("swap", 2)})
    page = written(tmp_path, runs, setup={"data": {"dataset": "digits", "image_size": 16}})
    table = (tmp_path / "table.md").read_text("utf-8")
    for line in table.splitlines()[2:7]:
        for cell in line.strip("| ").split(" | ")[1:]:
            assert cell.strip(" *") in page.cells
    assert "swap (1 of 3 diverged)" in page.text
    assert "dataset digits · image size 16" in page.text
    assert "the command" in page.text
    assert page.cells.count("diverged") == 3  # leak, kNN and loss of the run that did


@pytest.mark.usefixtures("without_figures")
def test_names_are_text_and_not_markup(tmp_path: Path) -> None:
    bad = "<script>alert('no')</script>"
    page = written(tmp_path, [made_up_record(bad)], setup={bad: {bad: bad}})
    assert bad in page.text
    assert bad not in (tmp_path / "report.html").read_text("utf-8")


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize(
    "record",
    [
        {"bn": "local", "seed": 0},
        diverged_record(),
        made_up_record(leak=None, leak_interval=None, curve=None, stability=None),
        made_up_record(leak_interval=[1], curve=[{}], stability={}, epochs=None),
    ],
)
def test_page_does_without_what_is_missing(tmp_path: Path, record: Record) -> None:
    page = written(tmp_path, [record])
    for word in ("None", "nan", "inf]"):
        assert word not in page.text


def said(records: list[Record], tmp_path: Path) -> str:
    """What the page says above its table."""
    page = written(tmp_path, records, setup={"data": {"dataset": "digits"}})
    return page.text.replace("\xa0", " ").partition("Results")[0]


@pytest.mark.usefixtures("without_figures")
def test_page_says_what_each_interval_means(tmp_path: Path) -> None:
    text = said(made_up_records(("local", "regroup")), tmp_path)
    assert "trained on digits for 10 epochs on 2 ranks × 16 groups with each" in text
    local, regroup = text.split("regroup:")
    assert re.search(
        r"local: leak 0\.\d+ \(95 % interval 0\.\S+ to 0\.\S+\): a leak: at least", local
    )
    assert re.search(
        r"^ leak \S+ \(95 % interval −\S+ to 0\.\S+\): (no leak found|can't tell)", regroup
    )


@pytest.mark.usefixtures("without_figures")
def test_page_says_what_is_special_of_the_rivals(tmp_path: Path) -> None:
    """Catches a proof that is told as an interval, and numbers compared that mean other things."""
    runs = made_up_records(("regroup", "eman", "simclr"))
    for run in runs[1::3]:
        run.update(leak=0.0, leak_interval=[0.0, 0.0])
    page = written(tmp_path, runs)
    text = page.text.replace("\xa0", " ")
    assert "eman: leak exactly 0, for no key depends on the other samples of its batch;" in text
    assert text.count("exactly 0, for") == 1
    assert IN_BATCH in text
    assert IN_BATCH in (tmp_path / "table.md").read_text("utf-8")
    for paper in ("2101.08482", "2002.05709"):
        assert ("a", "href", f"https://arxiv.org/abs/{paper}") in page.attributes


@pytest.mark.usefixtures("without_figures")
def test_page_says_how_activations_grow(tmp_path: Path) -> None:
    """The largest of all layers and runs; nothing of a run that diverged or has no numbers."""
    runs = made_up_records(("local", "swap", "sync"), diverged={("swap", 2)})
    runs[0]["stability"]["ratio"][2] = 1.234
    runs[-4]["stability"] |= dict(ratio=[1e30])  # swap of the seed that diverged
    for run in runs[2::3]:
        run["stability"] = {}
    page = written(tmp_path, runs)
    expected = "is 1.23 with local (spectral radius 1.00), 8 with swap (spectral radius 2.00). The"
    assert expected in page.text
    assert "Stability" not in written(tmp_path, runs[2::3]).text


@pytest.mark.usefixtures("without_figures")
def test_page_ranks_no_more_than_it_can(tmp_path: Path) -> None:
    knn = {"local": 0.970, "regroup": 0.971, "swap": 0.9}
    runs = [made_up_record(bn, k, knn=v + k / 1000) for bn, v in knn.items() for k in range(3)]
    assert "no ranking by kNN accuracy between local and regroup." in said(runs, tmp_path)
    assert "too few seeds to rank" in said([run for run in runs if run["seed"] == 0], tmp_path)
    alone = said([run for run in runs if run["bn"] == "swap"], tmp_path)
    assert "rank" not in alone.replace("ranks", "")


@pytest.mark.usefixtures("without_figures")
def test_page_hides_no_divergence(tmp_path: Path) -> None:
    runs = made_up_records(("local", "swap"), diverged=[("swap", k) for k in range(3)])
    assert "swap: all 3 runs diverged; nothing else is said of it." in said(runs, tmp_path)
    runs = made_up_records(("local", "swap"), diverged=[("swap", 0)])
    assert "1 of 3 runs diverged and is in no mean." in said(runs, tmp_path)
    assert "local: the leak was not measured;" in said([made_up_record(leak=None)], tmp_path)
    no_interval = made_up_record(leak_interval=None, leak_standard_error=None)
    assert re.search(r"local: leak 0\.\d+, with no interval;", said([no_interval], tmp_path))


@pytest.mark.parametrize("records", [[], {"bn": "local"}, [{"seed": 0}]])
def test_what_is_no_list_of_records_is_refused(tmp_path: Path, records: Any) -> None:
    with pytest.raises(ResultsError, match=r"^report: .*record"):
        write_report(tmp_path, records, command="")
    assert not list(tmp_path.iterdir())
