"""How a worker's processes start: forked on a CPU by a launcher of one thread, spawned otherwise."""

import multiprocessing
import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("sglang", reason="needs the serve environment")

CPU = {"device": "cpu", "numa_node": None}


@pytest.fixture
def launched(monkeypatch):
    """`launched(**arguments)`: the module that SGLang's Engine takes processes from, of a launcher with one thread."""
    from pdtrim_sglang import sglang_host
    from pdtrim_sglang.patches import processes
    from sglang.srt.entrypoints import engine

    def launch(folder, **arguments):
        monkeypatch.setattr(processes, "THREADS", folder)
        monkeypatch.setattr(sglang_host, "server_arguments", lambda: SimpleNamespace(**CPU | arguments))
        module = processes.fork_on_cpu(lambda *_: engine.mp, "of the engine")
        assert engine.mp is multiprocessing, "what SGLang starts later is spawned"
        return module

    return launch


@pytest.fixture
def one_thread(tmp_path):
    (tmp_path / "1").mkdir()
    return tmp_path


def test_on_a_cpu_processes_are_forked(launched, one_thread):
    assert launched(one_thread).get_start_method() == "fork"


@pytest.mark.parametrize("arguments", [{"device": "cuda"}, {"numa_node": [0]}], ids=["a GPU", "numactl"])
def test_sglangs_way_stays(launched, one_thread, arguments):
    assert launched(one_thread, **arguments) is multiprocessing


def test_a_launcher_of_two_threads_is_not_forked(launched, one_thread):
    (one_thread / "2").mkdir()
    assert launched(one_thread) is multiprocessing
    assert launched(one_thread / "absent") is multiprocessing


def test_threads_of_this_process_are_counted(launched):
    from pdtrim_sglang.patches.processes import THREADS

    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    try:
        assert launched(THREADS) is multiprocessing
    finally:
        ended.set()
        thread.join()


def test_an_error_of_the_start_goes_on_and_leaves_sglangs_way(launched, one_thread, monkeypatch):
    from pdtrim_sglang.patches import processes
    from sglang.srt.entrypoints import engine

    launched(one_thread)
    with pytest.raises(ZeroDivisionError):
        processes.fork_on_cpu(lambda: 1 // 0)
    assert engine.mp is multiprocessing
