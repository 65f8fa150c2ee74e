"""The page: whole, self-contained, and honest about what the numbers allow."""

import base64
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from moco.comparison.made_up import Record, diverged_record, made_up_record, made_up_records
from shuffle_batchnorm.moco.comparison import report
from shuffle_batchnorm.moco.comparison.report import write_report
from shuffle_batchnorm.moco.comparison.summary import ResultsError
from shuffle_batchnorm.moco.comparison.tables import IN_BATCH

VOID = {"meta", "img", "br"}
PNG = b"\x89PNG\r\n\x1a\n"


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

    def save_figures(folder: Path, records: Sequence[Record]) -> Mapping[str, Path]:
        assert records
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "leak.png").write_bytes(PNG)
        return {"leak": folder / "leak.png"}

    monkeypatch.setattr(report, "save_figures", save_figures)


def written(output: Path, records: list[Record], **options: Any) -> Page:
    return Page(write_report(output, records, command="the command", **options).read_text("utf-8"))


def test_page_is_whole_and_holds_its_pictures(tmp_path: Path) -> None:
    page = written(tmp_path, made_up_records(("local",), range(1)))
    sources = [value for _, name, value in page.attributes if name == "src"]
    assert len(sources) == 2
    for source in sources:
        head, data = source.split(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data).startswith(PNG)
    assert sorted(path.name for path in (tmp_path / "figures").glob("*.png")) == [
        "curves.png",
        "leak.png",
        "leak_and_cure.png",
    ]


@pytest.mark.usefixtures("without_figures")
def test_page_asks_nothing_of_the_network(tmp_path: Path) -> None:
    page = written(tmp_path, made_up_records())
    assert not {tag for tag, _, _ in page.attributes} & {"link", "script", "iframe"}
    assert {value for _, name, value in page.attributes if name == "href"} == {
        "https://arxiv.org/abs/1911.05722"
    }
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "@import" not in text
    assert "url(" not in text


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
    assert ("img", "style", "width:6.9in") in page.attributes


@pytest.mark.usefixtures("without_figures")
def test_names_are_text_and_not_markup(tmp_path: Path) -> None:
    bad = "<script>alert('no')</script>"
    page = written(tmp_path, [made_up_record(bad)], setup={bad: {bad: bad}})
    assert bad in page.text
    assert "script" not in {tag for tag, _, _ in page.attributes}


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
def test_page_says_whose_interval_covers_zero(tmp_path: Path) -> None:
    text = said(made_up_records(("local", "regroup")), tmp_path)
    assert "trained on digits for 10 epochs on 2 ranks × 16 groups with each" in text
    local, regroup = text.split("regroup:")
    assert re.search(r"local: leak 0\.\d+ \(95 % interval 0\..* does not cover zero\);", local)
    assert "covers zero: no leak was found, but one as large as the upper end" in regroup
    leaky = said([made_up_record("regroup", k, leak=0.2 + k / 100) for k in range(3)], tmp_path)
    assert "covers zero" not in leaky


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
