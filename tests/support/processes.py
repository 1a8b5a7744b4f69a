"""A few processes of this machine that make a torch.distributed group and run functions of test modules together."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch


class Processes:
    """``run(function, *arguments)`` calls ``function(rank, *arguments)`` in every process of a gloo group.

    The processes stay for the next call. Where one raises, or ``seconds`` are over, all are ended, the error is raised
    here, and the next call starts others.
    """

    def __init__(self, count: int = 2, seconds: float = 120.0) -> None:
        self.count, self.seconds = count, seconds
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        self._folder: TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What each process returned, by rank: plain values rather than tensors."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = self._answers()
        errors = [f"rank {rank}: {text}" for rank, (kind, text) in sorted(answers.items()) if kind == "error"]
        if len(answers) < self.count and not errors:
            errors.append(f"no answer within {self.seconds:g} s")
        if errors:
            self.close(kill=True)
            raise RuntimeError("\n".join(errors))
        return [answers[rank][1] for rank in range(self.count)]

    def _answers(self) -> dict[int, tuple[str, Any]]:
        """Those that come in time. The others of one that has failed may wait for it: theirs are not waited for."""
        end = time.monotonic() + self.seconds
        answers: dict[int, tuple[str, Any]] = {}
        while len(answers) < self.count and all(kind == "result" for kind, _ in answers.values()):
            waiting = {self._pipes[rank]: rank for rank in range(self.count) if rank not in answers}
            ready = wait(list(waiting), max(0.0, end - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                try:
                    answers[waiting[pipe]] = pipe.recv()
                except EOFError:
                    answers[waiting[pipe]] = "error", "the process ended"
        return answers

    def close(self, kill: bool = False) -> None:
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            if kill:
                process.kill()
            elif process.is_alive():
                pipe.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._pipes, self._folder = [], [], None

    def _start(self) -> None:
        self._folder = TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            arguments = rank, self.count, str(Path(self._folder.name) / "group"), self.seconds, theirs
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that a process that ends is noticed
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(rank: int, count: int, path: str, seconds: float, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=count, timeout=timedelta(seconds=seconds)
    )
    while (task := pipe.recv()) is not None:
        function, arguments = task
        torch.manual_seed(0)
        try:
            pipe.send(("result", function(rank, *arguments)))
        except BaseException:
            pipe.send(("error", traceback.format_exc()))
    torch.distributed.destroy_process_group()
