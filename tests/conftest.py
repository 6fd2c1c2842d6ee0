"""Device and dtype from the command line, the one table of tolerances, a fresh seed for every test, a web server."""

from __future__ import annotations

import functools
import os
import random
import signal
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from rkd_plugin.cores import usable_cores

# The error that a kernel may have in addition to that of the plain formula in the same dtype: absolute for values (all
# of order 1), and relative to the largest entry for gradients.
TOLERANCE = {
    # 2e-16, times the 1e5 that the law of cosines loses in the tightest cluster, whose spread is 1e-5 of the batch.
    torch.float64: 1e-10,
    # 6e-8 per rounding; a sum of N rounded terms loses about one digit.
    torch.float32: 1e-6,
    # Computed in float32, then a gradient is rounded once: half a unit in the last place, 2**-11 ...
    torch.float16: 2.0**-11 + 1e-6,
    # ... and 2**-8 of a mantissa of 8 bits (2**-9 of the value, for an entry just above a power of two).
    torch.bfloat16: 2.0**-8 + 1e-6,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the tests that use one")
    parser.addoption(
        "--dtype", default="all", choices=["all", *(str(d).removeprefix("torch.") for d in TOLERANCE)], help="one dtype"
    )


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker for each usable core; none, as debugging needs it, for tests that are chosen by path, name or mark."""
    is_chosen = any(word.startswith(("-k", "-m")) for word in config.invocation_params.args)
    return 0 if is_chosen or config.args_source is pytest.Config.ArgsSource.ARGS else usable_cores()


def pytest_configure(config: pytest.Config) -> None:
    # A process in the background of a shell ignores SIGINT, and so would the processes that the tests start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Runs are compared with torchdistill's loops number by number, which needs the same number of threads. Workers
    # inherit the variable, and have a core each.
    threads = 1 if config.getoption("numprocesses") else torch.get_num_threads()
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "dtype" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--dtype")
        dtypes = [d for d in TOLERANCE if chosen in ("all", str(d).removeprefix("torch."))]
        metafunc.parametrize("dtype", dtypes, ids=lambda d: str(d).removeprefix("torch."))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE[dtype]


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def web(tmp_path):
    """A folder, and its address on a local web server."""

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    folder = tmp_path / "web"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, args=[0.01]).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
