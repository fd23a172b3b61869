"""A gRPC server that answers with its name, and a client that counts such answers.

grpc_peers.py serve NAME ADDRESS      prints `ready`
grpc_peers.py serve-xds NAME ADDRESS  the same with a listener from the xDS server; then, as JSON,
                                      by which status a call to it fails
grpc_peers.py call                    reads lines `TARGET METHOD COUNT`; a JSON line for each:
                                      who answered, or the status code, and how often
"""

import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import grpc


class Answer(grpc.GenericRpcHandler):
    """Any method, answered with the server's name."""

    def __init__(self, name: str) -> None:
        self._name = name.encode()

    def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(lambda _request, _context: self._name)


def serve(name: str, address: str) -> None:
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((Answer(name),))
    server.add_insecure_port(address)
    server.start()
    print("ready", flush=True)
    server.wait_for_termination()


def serve_xds(name: str, address: str) -> None:
    server = grpc.server(ThreadPoolExecutor(4), xds=True)
    server.add_generic_rpc_handlers((Answer(name),))
    plain = grpc.insecure_server_credentials()
    server.add_secure_port(address, grpc.xds_server_credentials(plain))
    server.start()
    print("ready", flush=True)
    print(json.dumps(count(grpc.insecure_channel(address), "/demo.Greeter/Hello", 1)), flush=True)
    server.wait_for_termination()


def count(channel: grpc.Channel, method: str, number: int) -> Counter[str]:
    """Who answered how many of so many calls; or by which status they failed."""
    ask = channel.unary_unary(method)
    found: Counter[str] = Counter()
    for _ in range(number):
        try:
            found[ask(b"", timeout=30).decode()] += 1
        except grpc.RpcError as error:
            found[error.code().name] += 1
    return found


def call() -> None:
    channels: dict[str, grpc.Channel] = {}
    for line in sys.stdin:
        target, method, number = line.split()
        if target not in channels:
            channels[target] = grpc.insecure_channel(target)
        print(json.dumps(count(channels[target], method, int(number))), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(*sys.argv[2:])
    elif sys.argv[1] == "serve-xds":
        serve_xds(*sys.argv[2:])
    else:
        call()
