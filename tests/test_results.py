"""The results ledger: what is accepted, what is written, and what a reader gets to see."""

import json
import re

import pytest

from lecturekit import results, results_page
from lecturekit.claims import CLAIMS, ERRATA, KINDS


@pytest.fixture(autouse=True)
def ledger(tmp_path, monkeypatch):
    """An empty ledger, recording off, the full profile."""
    monkeypatch.setattr(results, "_memory", {})
    for name in ("LECTUREKIT_RECORD", "LECTUREKIT_LAB", "LECTUREKIT_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LECTUREKIT_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


@pytest.fixture
def recording(ledger, monkeypatch):
    monkeypatch.setenv("LECTUREKIT_RECORD", "1")
    return ledger


def record(**changes):
    given = {"claim": "C17", "quantity": "latency, merged ÷ base", "paper": 1.0, "ours": 1.01, "lab": "lab05_lora"}
    return results.record(**(given | changes))


def test_every_claim_of_the_lecture_is_there_once():
    assert list(CLAIMS) == [f"C{number:02}" for number in range(1, 41)]
    for claim in CLAIMS.values():
        assert set(claim.kind.split(" + ")) <= set(KINDS), claim.id
        assert set(claim.errata) <= set(ERRATA), claim.id
    assert {key for claim in CLAIMS.values() for key in claim.errata} == set(ERRATA)


def test_errata_figures_follow_from_their_derivations():
    """The numbers in the prose, computed again."""
    assert 1000 * 7e9 * 2 == 14e12  # 14 TB
    gib, base = (1.2427, 2.0882, 8.9478, 1.3013), (13.48, 26.03, 137.95, 14.48)
    mixed, honest = (10.87, 12.45, 15.41, 11.14), (10.10, 11.61, 14.36, 10.37)
    for size, delta, printed, right in zip(base, gib, mixed, honest, strict=True):
        # the base is rounded to 0.005 in size, so the ratio is good to 0.005 / delta
        assert abs(size / delta - printed) < 0.005 / delta + 0.03  # and the table divides sizes rounded to 0.01
        assert abs(size / (delta * 2**30 / 1e9) - right) < 0.005 / delta + 0.005
        assert f"{right:.2f}" in ERRATA["bitdelta-units"].correct


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"claim": "C41"}, ValueError, "C01 to C40, got 'C41'"),
        ({"quantity": " "}, ValueError, "quantity"),
        ({"ours": float("nan")}, ValueError, "ours must be finite"),
        ({"paper": float("inf")}, ValueError, "paper must be finite"),
        ({"ours": None}, TypeError, "ours must be a number or a text, got NoneType"),
        ({"ours": True}, TypeError, "ours"),
        ({"spread": -1.0}, ValueError, "spread must not be negative"),
        ({"spread": (2.0, 1.0)}, ValueError, "low <= high"),
        ({"spread": (1.0, 2.0, 3.0)}, ValueError, "got 3 numbers"),
        ({"spread": "wide"}, TypeError, "spread must be a number"),
        ({"seeds": 0}, ValueError, "seeds"),
        ({"ours": "many", "seeds": [0]}, TypeError, "ours must be a number"),
        ({"holds": 1}, TypeError, "holds"),
        ({"lab": None}, ValueError, "lab must be"),
        ({"lab": "../lab"}, ValueError, "lab must be"),
    ],
)
def test_wrong_arguments_are_named(changes, error, words):
    with pytest.raises(error, match=re.escape(words)):
        record(**changes)
    assert not results._memory


def test_tensors_and_numpy_numbers_become_plain_numbers():
    import numpy
    import torch

    entry = record(ours=torch.tensor(0.5), paper=numpy.float32(0.25), spread=(numpy.float64(0.0), 1))
    assert json.loads(json.dumps(entry))["ours"] == 0.5
    assert type(entry["paper"]) is float and entry["spread"] == [0.0, 1.0]


def test_nothing_is_written_unless_recording(ledger):
    record()
    assert not ledger.exists()


def test_the_smoke_profile_is_shown_but_never_recorded(recording, monkeypatch):
    monkeypatch.setenv("LECTUREKIT_PROFILE", "smoke")
    with pytest.raises(ValueError, match="smoke profile is no measurement"):
        record()
    assert not recording.exists()
    monkeypatch.delenv("LECTUREKIT_RECORD")
    record()
    assert "smoke profile: too short" in repr(results.table())


def test_an_entry_says_where_and_when_but_not_who(recording):
    import getpass
    import socket
    from pathlib import Path

    record(spread=0.02, seeds=[0, 1, 2])
    (file,) = recording.iterdir()
    assert file.name == "lab05_lora.json"
    (entry,) = results.read(file)
    assert entry["seeds"] == 3 and entry["profile"] == "full"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", entry["date"])
    assert {"cpu", "cores", "torch"} <= set(entry["machine"])
    text = file.read_text()
    assert str(Path.home()) not in text and str(Path.cwd()) not in text
    assert socket.gethostname() not in text
    assert f'"{getpass.getuser()}"' not in text


def test_measuring_again_replaces_and_keeps_the_rest(recording):
    record()
    record(quantity="max difference", ours=0.0)
    record(ours=1.5)
    entries = results.read(recording / "lab05_lora.json")
    assert {entry["quantity"]: entry["ours"] for entry in entries} == {
        "latency, merged ÷ base": 1.5,
        "max difference": 0.0,
    }
    assert len(results.table().entries) == 2


def test_the_lab_is_known_from_the_environment(monkeypatch):
    monkeypatch.setenv("LECTUREKIT_LAB", "lab05_lora")
    record(lab=None)
    assert results.table().lab == "lab05_lora" and len(results.table().entries) == 1


def test_table_in_html_and_in_plain_text():
    record(quantity="a < b", note="needs <b>care</b>", unit="×", spread=0.02, seeds=5, holds=False)
    bundle = results.table()._repr_mimebundle_()
    html, text = bundle["text/html"], bundle["text/plain"]
    assert "a &lt; b" in html and "<b>care" not in html
    assert html.count("<tr>") == 2 and 'scope="col"' in html and "<caption>" in html
    assert "1.01 ± 0.02 × (5 seeds)" in text and "a < b" in text and " no " in text
    header, _, row = text.splitlines()[1:]
    assert header.index("you") == row.index("1.01") and header.index("note") == row.index("needs")


def test_an_empty_table_says_so():
    assert "nothing measured yet" in repr(results.table("lab05_lora"))
    with pytest.raises(ValueError, match="lab must be named"):
        results.table()


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "GB", "–"),
        (1234567, "", "1,234,567"),
        (0.000123456, "s", "0.0001235 s"),
        (2.0, "×", "2 ×"),
        ("14 TB", "", "14 TB"),
        (45678.9, "", "45,679"),
        (-0.5, "", "-0.5"),
    ],
)
def test_figures_read_well(value, unit, text):
    assert results.figure(value, unit) == text


def test_the_page_holds_every_claim_and_every_erratum(recording):
    record(note="one | two", holds=False)
    page = results_page.render(recording)
    for claim in CLAIMS.values():
        assert page.count(f"### {claim.id}: ") == 1
    for erratum in ERRATA.values():
        assert erratum.derivation in page
    assert page.count("Not measured yet: lab not written.") == 39
    row = next(line for line in page.splitlines() if line.startswith("| latency"))
    assert "one \\| two" in row and "| no |" in row and len(re.findall(r"(?<!\\)\|", row)) == 7
    assert "1 of 40 claims" in page and "1. " in page.split("## Machines")[1]
    links = set(re.findall(r"\]\(#([^)]+)\)", page))
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    slugs = {"-".join("".join(c for c in h.lower() if c.isalnum() or c in "-_ ").split(" ")) for h in headings}
    assert links <= slugs and "machines" in links and len(links) > 1


def test_the_page_of_the_repository_is_in_step():
    """docs/results.md is what `lecturekit results` would write now."""
    from lecturekit.labs import repository

    docs = repository() / "docs"
    assert (docs / "results.md").read_text() == results_page.render(docs / "results")


def test_a_file_that_is_no_ledger_is_named(ledger):
    ledger.mkdir()
    (ledger / "lab05_lora.json").write_text("{}")
    with pytest.raises(ValueError, match=r"lab05_lora.json is not a results file"):
        results_page.render(ledger)


def entry(ours, seeds=1, holds=True, **more):
    return {
        "claim": "C17",
        "quantity": "q",
        "ours": ours,
        "seeds": seeds,
        "holds": holds,
        "note": "n",
        "spread": None,
    } | more


def test_runs_under_several_seeds_become_median_and_range():
    (found,) = results.combine([[entry(3.0)], [entry(1.0)], [entry(2.0, holds=False)]])
    assert (found["ours"], found["spread"], found["seeds"], found["holds"]) == (2.0, [1.0, 3.0], 3, False)
    assert found["note"] == "median and range; n"


def test_what_does_not_depend_on_the_seed_is_kept_as_it_is():
    fixed = entry("14 TB", seeds=None)
    assert results.combine([[fixed], [entry("14 TB", seeds=None)]]) == [fixed]
    assert results.combine([[entry(3.0)]]) == [entry(3.0)]


def test_runs_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="did not measure the same quantities"):
        results.combine([[entry(1.0)], [entry(1.0, quantity="other")]])
    with pytest.raises(TypeError, match="ours of 'q'"):
        results.combine([[entry("text")], [entry("text")]])
