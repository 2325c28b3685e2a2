"""Journals and locks keep what has been paid for."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from router_model.errors import PipelineError
from router_model.pipeline.artifacts import (
    Journal,
    locked_folder,
    read_journal,
    record_stage,
    stage_is_done,
    write_atomically,
)


def test_records_come_back_in_order(tmp_path: Path) -> None:
    """What was appended is read, across openings."""
    path = tmp_path / "j.jsonl"
    for start in (0, 3):
        with Journal(path) as journal:
            assert all(journal.append({"n": n, "text": "é\u2028"}) for n in range(start, start + 3))
    assert [record["n"] for record in read_journal(path)] == list(range(6))


@pytest.mark.parametrize("torn", [b'{"n": 2', b"x" * 200_000])
def test_a_torn_last_line_is_cut_and_nothing_else(tmp_path: Path, torn: bytes) -> None:
    """A kill in the middle of a write costs that record only, however long the torn part is."""
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"n": 0}\n{"n": 1}\n' + torn)
    assert [record["n"] for record in read_journal(path)] == [0, 1]
    with Journal(path) as journal:
        journal.append({"n": 2})
    assert [record["n"] for record in read_journal(path)] == [0, 1, 2]


def test_damage_inside_a_journal_is_reported(tmp_path: Path) -> None:
    """A damaged line that is not the last is an error with its number, not a silent loss."""
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"n": 0}\nbroken\n{"n": 2}\n')
    with pytest.raises(PipelineError, match=":2: damaged"):
        list(read_journal(path))


def test_on_a_full_disk_the_record_in_hand_finds_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the disk is full the ballast is given up: the record is kept and the caller told to stop."""
    real_write, path = os.write, tmp_path / "j.jsonl"
    ballast = tmp_path / ".j.jsonl.ballast"

    def write(file: int, data: bytes) -> int:
        if ballast.exists():
            real_write(file, data[:3])  # a full disk takes part of the line
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_write(file, data)

    with Journal(path) as journal:
        assert ballast.stat().st_size > 1_000_000
        monkeypatch.setattr(os, "write", write)
        assert journal.append({"n": 0}) is False
        assert journal.append({"n": 1}) is True
    assert [record["n"] for record in read_journal(path)] == [0, 1]
    assert not ballast.exists()


def test_a_disk_that_stays_full_is_an_error_and_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no room is found the append fails by name and the file holds whole records only."""
    real_write, path = os.write, tmp_path / "j.jsonl"

    def write(file: int, data: bytes) -> int:
        real_write(file, data[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Journal(path) as journal:
        journal.append({"n": 0})
        monkeypatch.setattr(os, "write", write)
        with pytest.raises(PipelineError, match="No space left"):
            journal.append({"n": 1})
    assert path.read_bytes() == b'{"n": 0}\n'


def test_a_folder_belongs_to_one_process(tmp_path: Path) -> None:
    """A second process that wants the folder is refused; after the first has ended it gets it."""
    code = (
        "import sys; from pathlib import Path; from router_model.pipeline.artifacts import locked_folder\n"
        "from router_model.errors import PipelineError\n"
        "try:\n    with locked_folder(Path(sys.argv[1])): pass\n"
        "except PipelineError as error: sys.exit(error.message)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with locked_folder(tmp_path):
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "another persyn process" in refused.stderr
    assert subprocess.run(command, check=False).returncode == 0


def test_atomic_write_keeps_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed write leaves the old content and no draft."""
    path = tmp_path / "f.json"
    write_atomically(path, b"old")

    def full(_file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PipelineError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_stage_is_done_for_its_inputs_and_outputs_only(tmp_path: Path) -> None:
    """Changed inputs, or a lost output, mean that the stage must run again."""
    output = tmp_path / "out"
    output.touch()
    record_stage(tmp_path, "train", {"seed": 0}, {"n": 1})
    assert stage_is_done(tmp_path, "train", {"seed": 0}, [output])
    assert not stage_is_done(tmp_path, "train", {"seed": 1}, [output])
    assert not stage_is_done(tmp_path, "score", {"seed": 0}, [output])
    output.unlink()
    assert not stage_is_done(tmp_path, "train", {"seed": 0}, [output])
    assert json.loads((tmp_path / "train.manifest.json").read_text())["persyn_version"]
