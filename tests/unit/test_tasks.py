"""Background tasks of the service, which must not end while it runs."""

import asyncio

from rollout_service.fleet.kept_running import kept_running


async def test_work_that_ends_with_an_error_is_logged_and_begins_again(monkeypatch, caplog):
    monkeypatch.setattr("rollout_service.fleet.kept_running.AGAIN_AFTER", 0.0)
    begun, third = [], asyncio.Event()

    async def work():
        begun.append(len(begun))
        if len(begun) == 3:
            third.set()
            await asyncio.Event().wait()
        raise KeyError(f"error {len(begun)}")

    task = asyncio.create_task(kept_running("the watch of engine 0", work))
    async with asyncio.timeout(5.0):
        await third.wait()
    assert not task.done()
    assert caplog.text.count("the watch of engine 0 ended with an error; it begins again") == 2
    assert "KeyError: 'error 1'" in caplog.text
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled(), "a task that is told to stop logs no error"
