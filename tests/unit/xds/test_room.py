"""What is on its way to clients at a time is bounded, and nobody waits for a client that sleeps."""

import asyncio

from xds_server.room import Room


async def test_large_messages_take_turns_and_small_ones_pass() -> None:
    room = Room(100, 10, 60)
    on_the_way, most, passed = 0, 0, 0

    async def send(size: int) -> None:
        nonlocal on_the_way, most, passed
        async with room.for_(size):
            on_the_way += size
            most = max(most, on_the_way)
            for _ in range(3):
                await asyncio.sleep(0)
            on_the_way -= size
            passed += 1

    await asyncio.gather(*(send(40) for _ in range(20)))
    assert (passed, most) == (20, 80)
    assert room.passes(10)
    assert not room.passes(11)
    await asyncio.wait_for(send(1000), 5)
    assert passed == 21


async def test_a_client_that_does_not_read_keeps_nobody_waiting() -> None:
    room = Room(100, 10, 0.01)
    stuck = asyncio.Event()

    async def hold() -> None:
        async with room.for_(100):
            await stuck.wait()

    held = [asyncio.create_task(hold()) for _ in range(3)]
    await asyncio.sleep(0)
    async with asyncio.timeout(10), room.for_(100):
        pass
    stuck.set()
    await asyncio.gather(*held)
    # What was given back once is not given back again: there is room for one, not for four.
    async with room.for_(100):
        second = asyncio.create_task(hold())
        await asyncio.sleep(0)
        assert room._taken == 100
    await second


async def test_who_gives_up_waiting_leaves_the_room_to_others() -> None:
    room = Room(100, 10, 60)
    async with room.for_(100):
        waiting = [asyncio.create_task(room.for_(100).__aenter__()) for _ in range(3)]
        await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    async with asyncio.timeout(5), room.for_(100):
        pass
    assert room._taken == 0


async def test_it_tells_when_all_is_through() -> None:
    told = asyncio.Event()
    room = Room(100, 10, 60, told.set)
    async with room.for_(100):
        assert not told.is_set()
    await asyncio.wait_for(told.wait(), 30)
