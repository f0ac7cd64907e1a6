"""Artefacts of the benches: made once, all or nothing, keyed by what they depend on."""

import pytest

from vivace.bench import prepare
from vivace.bench.artefacts import Artefact, folder, versions
from vivace.errors import OutputError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_an_artefact_is_made_once_and_says_what_it_took():
    calls = []

    def make(place):
        calls.append(place)
        (place / "data").write_text("x" * 1000)

    artefact = Artefact("graph-tiny", {"a": 1}, make)
    assert not artefact.ready
    path = artefact.get()
    assert path.parent == folder() and (path / "data").is_file() and artefact.ready
    assert artefact.get() == path and len(calls) == 1
    assert artefact.told().startswith(f"{path.name}: 0 MB, made in 0 s")


def test_another_key_is_another_artefact():
    assert Artefact("g", {"a": 1}, print).path != Artefact("g", {"a": 2}, print).path


def test_an_artefact_that_fails_halfway_leaves_nothing_and_can_be_made_later():
    def fail(place):
        (place / "half").write_text("x")
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        Artefact("g", {}, fail).get()
    assert list(folder().iterdir()) == []
    assert Artefact("g", {}, lambda place: (place / "whole").write_text("x")).get().is_dir()


def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="XDG_CACHE_HOME"):
        Artefact("g", {}, lambda place: None).get()


def test_talk_of_exporters_does_not_reach_stdout(capsys):
    Artefact("g", {}, lambda place: print("exporting")).get()
    out, err = capsys.readouterr()
    assert out == "" and err == "exporting\n"


def test_versions_of_absent_libraries_are_none():
    assert versions("torch")["torch"] is not None and versions("no-such-library") == {"no-such-library": None}


def test_preparing_goes_on_after_a_failure_and_counts_it(monkeypatch, capsys):
    def fail(place):
        raise RuntimeError("no exporter\nmore")

    made = [Artefact("bad", {}, fail), Artefact("good", {}, lambda place: None)]
    monkeypatch.setattr(prepare, "artefacts", lambda: iter(made))
    monkeypatch.setattr(prepare, "latents", lambda: None)
    assert prepare.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FAILED bad RuntimeError: no exporter" and lines[1].startswith("made   good-")
    assert prepare.main() == 1 and "there  good-" in capsys.readouterr().out
