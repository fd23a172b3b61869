"""A case's figures as text, each beside what it should stay below."""

import statistics
from collections.abc import Iterator, Sequence

from xds_server.bench.measure import Result
from xds_server.bench.served import Command

_KIB, _MIB = 1 << 10, 1 << 20
#: For meshes of up to a thousand services and a thousand clients; seconds and bytes.
COLD_S, LAST_S, CPU_S = 1.0, 0.150, 0.150
MEMORY_EACH, MEMORY = 100 * _KIB, 300 * _MIB


def told(result: Result) -> Iterator[str]:
    """A result for people: median of the rounds, least and most behind it."""
    cold = result.cold
    yield str(result.case)
    yield (
        f"  from objects to the first full push: {cold.seconds * 1000:.0f} ms"
        f"{_reached(cold.seconds, COLD_S, 1000)}"
    )
    yield f"  all connected and complete after {result.connected:.1f} s"
    each = result.memory_each
    yield f"  memory a client: {each / _KIB:.0f} KiB{_reached(each, MEMORY_EACH, 1 / _KIB)}"
    most = max(result.memory, result.memory_after)
    yield (
        f"  memory: {result.memory_before / _MIB:.0f} MiB alone, {result.memory / _MIB:.0f} with "
        f"the clients, {result.memory_after / _MIB:.0f} after the changes"
        f"{_reached(most, MEMORY, 1 / _MIB)}"
    )
    for command, rounds in result.rounds.items():
        bare = result.bare if command is Command.MOVE_ENDPOINT else ()
        yield (
            f"  {command}: {rounds[0].clients} clients, "
            f"{rounds[0].bytes_each:.0f} bytes each, "
            f"{rounds[0].change.translated} pieces translated, "
            f"{rounds[0].change.encodings} encoded"
        )
        yield f"    from the change to the ACK, ms: p50 {_spread([r.p50 for r in rounds])}, " + (
            f"p99 {_spread([r.p99 for r in rounds])}"
        )
        last = _against([r.last for r in rounds], [r.last for r in bare], LAST_S)
        yield f"    last ACK, ms: {last}"
        cpu = _against([r.change.cpu for r in rounds], [r.change.cpu for r in bare], CPU_S)
        yield f"    server CPU, ms: {cpu}"


def _reached(value: float, bound: float, scale: float) -> str:
    return f" ({'reached' if value <= bound else 'NOT reached'}: {bound * scale:.0f})"


def _against(ours: Sequence[float], bare: Sequence[float], bound: float) -> str:
    middle = statistics.median(ours)
    text = f"{_spread(ours)}{_reached(middle, bound, 1000)}"
    if not bare:
        return text
    ratio = middle / statistics.median(bare)
    return f"{text}, {ratio:.2f} times that of a bare grpc.aio fan-out, {_spread(bare)}"


def _spread(seconds: Sequence[float]) -> str:
    low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
    return f"{middle * 1000:.1f} ({low * 1000:.1f} - {high * 1000:.1f})"
