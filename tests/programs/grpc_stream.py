"""A gRPC server that echoes streams, and a client that checks what comes back. Run in a pod.

grpc_stream.py serve PORT        grpc_stream.py chat ADDRESS MESSAGES SIZE
"""

import hashlib
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Queue

import grpc

#: Only a failure waits so long, in seconds.
DEADLINE = 30
_ECHO = "/test.Stream/Echo"


def _echo(requests: Iterator[bytes], _context: grpc.ServicerContext) -> Iterator[bytes]:
    for request in requests:
        yield hashlib.sha256(request).digest() + request


class _Handler(grpc.GenericRpcHandler):
    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return grpc.stream_stream_rpc_method_handler(_echo) if details.method == _ECHO else None


def serve(port: int) -> None:
    server = grpc.server(ThreadPoolExecutor(8), handlers=[_Handler()])
    server.add_insecure_port(f"0.0.0.0:{port}")
    server.start()
    server.wait_for_termination()


def chat(address: str, messages: int, size: int) -> None:
    """Streams both ways at once, twice: at full speed, and each message after the last's answer."""
    chance = random.Random(messages)
    sent = [chance.randbytes(chance.randrange(size)) for _ in range(messages)]
    wanted = [hashlib.sha256(each).digest() + each for each in sent]
    with grpc.insecure_channel(address) as channel:
        call = channel.stream_stream(_ECHO)
        assert list(call(iter(sent), timeout=DEADLINE)) == wanted
        turns: Queue[bytes | None] = Queue()
        answers = call(iter(turns.get, None), timeout=DEADLINE)
        for each, answer in zip(sent, wanted, strict=True):
            turns.put(each)
            assert next(answers) == answer
        turns.put(None)
        assert list(answers) == []


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        chat(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
