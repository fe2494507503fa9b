"""The run folder: whole checkpoints or none, the newest whole one found, nothing made when refused.

Oracles: the files on disk, spoilt the way crashes, full disks and hands spoil them.
"""

import json
import multiprocessing
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch

from pixart_ft.errors import UserError
from pixart_ft.files import write_file, write_text
from pixart_ft.runs.folder import RunFolder
from pixart_ft.runs.lock import RunLock
from pixart_ft.training.nested import load_nested, save_nested


def writer(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "state.txt").write_text(text)
        (folder / "deeper").mkdir()
        (folder / "deeper" / "more.bin").write_bytes(b"\0" * 1000)

    return write


def steps(run: RunFolder) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "runs" / "test", resume=False)


def test_an_existing_run_is_refused_and_untouched_unless_resumed(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "one"
    RunFolder(path).check_new(resume=False)
    assert not path.parent.exists()  # checking makes nothing
    run = RunFolder.create(path, resume=False)
    run.log.path.write_text("kept")
    with pytest.raises(
        UserError, match=r"one exists already; choose another run\.name, continue it with --resume auto"
    ):
        RunFolder.create(path, resume=False)
    RunFolder.create(path, resume=True)
    assert run.log.path.read_text() == "kept"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file; choose another run"):
        RunFolder.create(tmp_path / "file", resume=True)


def test_an_empty_folder_and_auto_resume_of_nothing_begin_a_run(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    assert RunFolder.create(tmp_path / "made", resume=False).resolve_resume("auto") is None
    assert RunFolder(tmp_path / "absent").resolve_resume("auto") is None


def test_saves_whole_folders_and_keeps_the_newest(run: RunFolder) -> None:
    for step in (10, 20, 30):
        assert run.save(step, writer(str(step)), keep=2) == run.checkpoints / f"step-{step:06d}"
    assert steps(run) == ["step-000020", "step-000030"]
    newest = run.newest()
    assert newest is not None and (newest / "state.txt").read_text() == "30"
    run.save(30, writer("again"), keep=2)
    assert (newest / "state.txt").read_text() == "again"
    assert steps(run) == ["step-000020", "step-000030"]


def test_steps_are_ordered_as_numbers(run: RunFolder) -> None:
    run.save(999_999, writer(""), keep=3)
    run.save(1_000_000, writer(""), keep=3)
    newest = run.newest()
    assert newest is not None and newest.name == "step-1000000"


def test_saving_after_going_back_drops_the_abandoned_course_and_never_the_only_good_one(
    run: RunFolder,
) -> None:
    for step in (10, 20, 30):
        run.save(step, writer("old"), keep=3)
    for broken in ("step-000010", "step-000020"):
        (run.checkpoints / broken / "state.txt").write_text("spoilt")
    run.save(25, writer("new"), keep=1)
    assert steps(run) == ["step-000025"]
    (run.checkpoints / "step-000025" / "state.txt").unlink()
    run.save(35, writer("newer"), keep=2)  # a broken one takes no place among the kept
    assert steps(run) == ["step-000035"]


def spoil_size(folder: Path) -> str:
    os.truncate(folder / "deeper" / "more.bin", 500)
    return r"more\.bin has 500 bytes instead of 1000"


def spoil_bytes(folder: Path) -> str:
    (folder / "deeper" / "more.bin").write_bytes(b"\0" * 999 + b"\1")
    return r"contents of .*more\.bin have changed"


def spoil_presence(folder: Path) -> str:
    (folder / "state.txt").unlink()
    return r"state\.txt is missing"


def spoil_manifest(folder: Path) -> str:
    (folder / "manifest.json").write_text('{"state.txt": [2,')
    return r"manifest\.json is missing or unreadable"


@pytest.mark.parametrize("spoil", [spoil_size, spoil_bytes, spoil_presence, spoil_manifest])
def test_a_broken_newest_checkpoint_is_passed_over_with_a_warning(run: RunFolder, spoil: Callable[[Path], str]) -> None:
    run.save(10, writer("10"))
    run.save(20, writer("20"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run.newest() == run.checkpoints / "step-000020"
    message = spoil(run.checkpoints / "step-000020")
    with pytest.warns(UserWarning, match=f"passed over a broken checkpoint: .*step-000020.*{message}|{message}"):
        assert run.newest() == run.checkpoints / "step-000010"
    with pytest.raises(UserError, match=f"the checkpoint is broken: .*{message}"):
        run.resolve_resume(str(run.checkpoints / "step-000020"))
    assert run.resolve_resume(str(run.checkpoints / "step-000010")) == run.checkpoints / "step-000010"


def test_resume_takes_only_checkpoints_of_this_run(run: RunFolder, tmp_path: Path) -> None:
    run.save(10, writer(""))
    other = RunFolder.create(tmp_path / "runs" / "other", resume=False)
    other.save(10, writer(""))
    for wrong in (other.checkpoints / "step-000010", run.path, run.checkpoints, tmp_path / "typo"):
        with pytest.raises(UserError, match=r"not a checkpoint of the run .*it has: step-000010.*--init-from"):
            run.resolve_resume(str(wrong))
    with pytest.raises(UserError, match="there is no such folder; give auto"):
        run.resolve_resume(str(run.checkpoints / "step-000099"))


def test_a_failed_save_leaves_everything_as_it_was(run: RunFolder) -> None:
    run.save(10, writer("10"))

    def fail(folder: Path) -> None:
        writer("half")(folder)
        raise KeyboardInterrupt

    for step in (10, 20):
        with pytest.raises(KeyboardInterrupt):
            run.save(step, fail, keep=1)
    assert steps(run) == ["step-000010"]
    newest = run.newest()
    assert newest is not None and (newest / "state.txt").read_text() == "10"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_said_clearly(run: RunFolder) -> None:
    run.save(10, writer("10"))

    def fill_up(folder: Path) -> None:
        (folder / "state.txt").write_text("half")
        Path("/dev/full").write_text("the rest")

    said = r"step-000020 cannot be written: no space is left on the disk; make room, or choose another place"
    with pytest.raises(UserError, match=said):
        run.save(20, fill_up)
    assert steps(run) == ["step-000010"]


def save_and_die(path: Path) -> None:
    def die(folder: Path) -> None:
        writer("half")(folder)
        os.kill(os.getpid(), signal.SIGKILL)

    RunFolder(path).save(20, die)


def test_a_process_killed_while_saving_leaves_the_earlier_checkpoint_the_newest(run: RunFolder) -> None:
    run.save(10, writer("10"))
    process = multiprocessing.get_context("fork").Process(target=save_and_die, args=(run.path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert run.newest() == run.checkpoints / "step-000010"
    run.save(20, writer("20"))
    assert steps(run) == ["step-000010", "step-000020"]  # and what it left aside is gone


def test_the_log_is_cut_to_the_step_resumed_from(run: RunFolder) -> None:
    lines = [json.dumps({"step": step, "loss": 0.5}) + "\n" for step in (0, 10, 20, 30)]
    run.log.path.write_text("".join(lines) + '{"step": 40, "lo')
    run.log.cut(20)
    assert run.log.path.read_text() == "".join(lines[:3])
    run.log.path.unlink()
    run.log.cut(20)
    assert not run.log.path.exists()


def test_an_optimizer_state_survives_a_file_bit_for_bit(tmp_path: Path) -> None:
    weights = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.99))
    for _ in range(2):
        torch.stack([(w**2).sum() for w in weights]).sum().backward()
        optimizer.step()
    tree = {
        "optimizer": optimizer.state_dict(),
        "scaler": None,
        "empty": {},
        "nested": [1, (2.5, float("inf"), 0.1 + 0.2), [], "text", True],
        "bf16": torch.randn(5, 4).bfloat16().T,
        "count": torch.tensor(7),
    }
    save_nested(tmp_path / "state.safetensors", tree)
    loaded = load_nested(tmp_path / "state.safetensors")

    def same(a: object, b: object) -> bool:
        if isinstance(a, torch.Tensor):
            return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(a, dict) and isinstance(b, dict):
            return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
        if isinstance(a, list | tuple) and isinstance(b, list | tuple):
            return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
        return type(a) is type(b) and a == b

    assert same(tree, loaded)
    torch.optim.AdamW(weights).load_state_dict(loaded["optimizer"])


@pytest.mark.parametrize(
    "damage", [b'{"step": 10, "lo\xff\n', b"\xff\xfe\n", b"7\n", b'{"loss": 1}\n', b"[" * 5000 + b"\n"]
)
def test_a_damaged_line_of_the_log_costs_no_other_line(run: RunFolder, damage: bytes) -> None:
    lines = [json.dumps({"step": step}).encode() + b"\n" for step in (0, 10, 20, 30)]
    run.log.path.write_bytes(lines[0] + damage + b"".join(lines[1:]) + damage)
    with pytest.warns(UserWarning, match="damaged lines, left out: 2"):
        assert [record["step"] for record in run.log.records()] == [0, 10, 20, 30]
    run.log.cut(20)
    assert run.log.path.read_bytes() == lines[0] + damage + lines[1] + lines[2]
    run.log.append({"step": 30}, {"loss": 0.5})
    assert run.log.path.read_bytes().startswith(lines[0] + damage + lines[1] + lines[2] + b'{"step": 30, "time": ')
    run.log.cut(-1)  # the run begins again
    assert run.log.path.read_bytes() == b""


def hold(path: Path, taken: Event) -> None:
    with RunLock(path) as lock:
        lock.take()
        taken.set()
        time.sleep(60)


def test_a_run_folder_has_one_writer_and_a_killed_one_blocks_nobody(run: RunFolder) -> None:
    context = multiprocessing.get_context("fork")
    taken = context.Event()
    process = context.Process(target=hold, args=(run.path, taken))
    process.start()
    assert taken.wait(30)
    with RunLock(run.path) as lock:
        named = rf"{run.path} is in use by process {process.pid} on {socket.gethostname()} since 20.*; wait for it"
        with pytest.raises(UserError, match=named):
            lock.take()
        process.kill()
        process.join()
        lock.take()
        lock.take()  # once is enough
        with RunLock(run.path) as other, pytest.raises(UserError, match=f"process {os.getpid()} on"):
            other.take()
    with RunLock(run.path) as again:
        again.take()


def test_a_lock_alone_makes_no_run(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("")
    RunFolder(tmp_path).check_new(resume=False)


@pytest.mark.parametrize("empty", ["", " "])
def test_resuming_from_an_empty_text_is_a_mistake(run: RunFolder, empty: str) -> None:
    with pytest.raises(UserError, match=r"--resume is empty; give auto or .*checkpoints/step-XXXXXX"):
        run.resolve_resume(empty)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "config.yaml"
    write_text(path, "one")

    def fail(aside: Path) -> None:
        aside.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(path, fail)
    assert path.read_text() == "one"
    write_text(path, "zwei ä")
    assert path.read_bytes() == "zwei ä".encode()
    assert [p.name for p in path.parent.iterdir()] == ["config.yaml"]


def test_what_was_drawn_and_kept_after_a_step_goes_with_the_course_that_is_left(tmp_path: Path) -> None:
    """An adapter that stayed would stand for that of the new course, which keeps what is there."""
    run = RunFolder(tmp_path)
    for step in (0, 4, 8):
        for folder in (run.samples_at(step), run.kept_at("adapter", step)):
            folder.mkdir(parents=True)
        run.samples_at(step).with_suffix(".png").touch()
    run.cut(4)
    assert run.kept_steps("adapter") == [0, 4]
    names = ["step-000000", "step-000000.png", "step-000004", "step-000004.png"]
    assert sorted(path.name for path in run.samples.iterdir()) == names
