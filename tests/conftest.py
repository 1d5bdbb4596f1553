"""Async tests run on uvloop, each on a loop of its own, and fail if they leave a task behind."""

import asyncio
import inspect
import signal
from collections.abc import Callable, Iterator

import pytest
import uvloop

from tests.redis_server import RedisServer

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background, where shells ignore it. The processes that tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A real Redis that tests share, each in realms of its own."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


async def _guarded(function: Callable[..., object], arguments: dict[str, object]) -> None:
    result = function(**arguments)
    assert inspect.isawaitable(result)
    await result
    await asyncio.sleep(0)
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    if left:
        await asyncio.wait(left, timeout=0.2)
    left = [task for task in left if not task.done()]
    assert not left, f"the test left tasks behind: {left}"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_guarded(pyfuncitem.obj, {name: pyfuncitem.funcargs[name] for name in names}))
    return True
