"""Python scripts in processes of their own that start at once: forks of a process that has imported everything.

A script of ours imports torch, transformers and a host, which takes ten seconds of a core, more than what most tests
have it do. `tests/conftest.py` therefore forks a server when all test files are imported and no test has run, and
`run_script` has this server fork a process for every script. Such a process has a working directory, arguments, an
environment and files for its output of its own; ranks may be forked from it, it may be killed, and it leaves nothing
behind. It differs from `python script.py` in one way: what the test files import is imported already.
"""

import contextlib
import json
import logging
import os
import random
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

SERVER: "Server | None" = None


def run_script(
    script: Path | str,
    *arguments: str,
    cwd: Path | str | None = None,
    env: dict[str, str] | None = None,
    ranks: int = 1,
    timeout: float = 900,
) -> subprocess.CompletedProcess[str]:
    """Run a Python script as `subprocess.run([sys.executable, script, *arguments])` would, with its output captured.

    Args:
        ranks: With two or more as `torchrun --nproc_per_node` would: that many processes, which know of each other by
            the environment. The first that fails gives the status, and the others are killed.

    Raises:
        subprocess.TimeoutExpired: After `timeout` seconds; the script and all that it has started are killed.
    """
    assert SERVER is not None, "tests/conftest.py starts the server with the first test"
    command = [str(script), *map(str, arguments)]
    env = dict(os.environ if env is None else env)
    if ranks == 1:
        environments = [env]
    else:
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        environments = [{**env, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return SERVER.run(command, str(cwd or os.getcwd()), environments, timeout)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Server:
    """The process whose forks run scripts. To be made where no thread holds a lock and no test has left anything."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="rl_plugins_tests_")
        self.address = os.path.join(self.folder.name, "socket")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.address)
        listener.listen(64)
        self.life, theirs = socket.socketpair()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            self.life.close()
            serve(listener, theirs)
        listener.close()
        theirs.close()

    def run(self, command: list[str], cwd: str, environments: list[dict[str, str]], timeout: float) -> Any:
        with tempfile.TemporaryDirectory(dir=self.folder.name) as folder, socket.socket(socket.AF_UNIX) as connection:
            out, err = (os.path.join(folder, name) for name in ("stdout", "stderr"))
            connection.connect(self.address)
            files = {"out": out, "err": err}
            request = {"command": command, "cwd": cwd, "environments": environments, "timeout": timeout, **files}
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile() as answers:
                answer = json.loads(answers.readline())
            printed, errors = (Path(path).read_text(errors="replace") for path in (out, err))
        if answer["status"] is None:
            raise subprocess.TimeoutExpired(command, timeout, printed, errors)
        return subprocess.CompletedProcess(command, answer["status"], printed, errors)

    def stop(self) -> None:
        """Scripts that still run then are killed by their timeouts."""
        self.life.close()
        os.waitpid(self.pid, 0)
        self.folder.cleanup()


def serve(listener: socket.socket, life: socket.socket) -> NoReturn:
    """Fork a process for every connection, until the other end of `life` is closed."""
    import select

    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the tests end on Ctrl-C, and the server with them
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
        while True:
            ready, _, _ = select.select([listener, life], [], [])
            if life in ready:
                os._exit(0)
            connection, _ = listener.accept()
            if not os.fork():
                listener.close()
                life.close()
                answer(connection)
                os._exit(0)
            connection.close()
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(1)


def answer(connection: socket.socket) -> None:
    """Run one script in forks, a fork for a rank, wait for their end, tell the status: None if it took too long."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with connection.makefile() as requests:
        request = json.loads(requests.readline())
    running: list[int] = []
    for env in request["environments"]:
        pid = os.fork()
        if not pid:
            connection.close()
            run_here(request, env)
        running.append(pid)
    groups, status, late = list(running), 0, False

    def end(*args: Any) -> None:
        nonlocal late
        late = late or bool(args)
        for group in groups:  # with what they have started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, request["timeout"])
    while running:
        pid, ended = os.wait()
        running.remove(pid)
        if ended and not status:
            status = os.waitstatus_to_exitcode(ended)
            end()
    signal.setitimer(signal.ITIMER_REAL, 0)
    end()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = {"status": None if late else status, "cpu": used.ru_utime + used.ru_stime}
    connection.sendall(json.dumps(result).encode() + b"\n")


def run_here(request: dict[str, Any], env: dict[str, str]) -> NoReturn:
    """Become the process of a script."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(env)
    redirect(request["out"], request["err"])
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    random.seed()
    script, *arguments = request["command"]
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    status: Any = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def redirect(out: str, err: str) -> None:
    """Have everything that is printed go to two files, also by handlers of logs, which hold pytest's streams."""
    old = {id(stream) for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)}
    for descriptor, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering=1, closefd=False)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)  # type: ignore[misc]
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", []):
            if isinstance(handler, logging.StreamHandler) and id(handler.stream) in old:
                handler.setStream(sys.stderr)
