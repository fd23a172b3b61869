"""The command line. Nouns read (check, status, bootstrap), verbs change (enroll, mode, ...)."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TextIO, TypeVar

from redirector import explain, options, output, report
from redirector.enrollment import Enrollment, default_enrollment, require_cgroup
from redirector.errors import InputError
from redirector.model import Accelerate, Mode
from redirector.processes import outside
from redirector.resolvers import with_resolvers

STATE_VARIABLE = "REDIRECTOR_STATE"
PINS_VARIABLE = "REDIRECTOR_PINS"


@dataclass(frozen=True)
class Context:
    """What a command may touch of the process it runs in."""

    out: TextIO
    environment: Mapping[str, str]

    def enrollment(self, tell: Callable[[str], None] | None = None) -> Enrollment:
        """The node's pods, at the places that the environment names."""
        state = self.environment.get(STATE_VARIABLE)
        pins = self.environment.get(PINS_VARIABLE)
        return default_enrollment(
            Path(state) if state else None, Path(pins) if pins else None, tell or _warn
        )


def _warn(text: str) -> None:
    print(f"redirector: {text}", file=sys.stderr)


Choice = TypeVar("Choice", Mode, Accelerate)
Command = Callable[[argparse.Namespace, Context], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. A user's error is one line on stderr."""

    def command(out: TextIO) -> int:
        arguments = _parser().parse_args(argv)
        chosen: Command = arguments.command
        return chosen(arguments, Context(out, os.environ))

    try:
        return output.run("redirector", command)
    except KeyboardInterrupt:
        print("redirector: interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the options are told by --help.

    A command whose rooms are dear to import declares its options only when it is the one given.
    """

    declare: Callable[[argparse.ArgumentParser], None] | None = None

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"redirector: {message}; see: {self.prog} --help\n")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As the base, once the options are declared."""
        if self.declare is not None:
            self.declare(self)
            self.declare = None
        return super().parse_known_args(args, namespace)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="redirector",
        description="Routes pod traffic to an Envoy sidecar, by eBPF or by iptables.",
        epilog=f"{STATE_VARIABLE} and {PINS_VARIABLE} name other places for records and pins.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, help_text: str) -> _Parser:
        sub = commands.add_parser(name, help=help_text, description=help_text)
        sub.set_defaults(command=command)
        return sub

    add("check", _check, "say what this kernel and machine can do")
    status = add("status", _status, "list the enrolled pods and their counters")
    status.add_argument("-o", "--output", choices=("text", "json"), default="text")
    flows = add("flows", _flows, "print the open connections, or each as it opens and closes")
    flows.declare = _declare_flows
    add("metrics", _metrics, "print the node's metrics once, as Prometheus reads them")
    proxies = add("proxy-status", _proxy_status, "where each sidecar stands with the xDS server")
    proxies.add_argument("--address", metavar="ADDR", help="the xDS server's --admin address")
    proxies.add_argument("-o", "--output", choices=("text", "json"), default="text")

    boot = add("bootstrap", _bootstrap, "print a sidecar's Envoy bootstrap (JSON)")
    boot.declare = _declare_bootstrap
    modes = [mode.value for mode in Mode]
    enroll = add("enroll", _enroll, "steer a pod's traffic to its sidecar")
    enroll.add_argument("name", metavar="NAME", nargs="?")
    enroll.add_argument("--config", type=Path, metavar="FILE", help="YAML or JSON; flags win")
    enroll.add_argument("--netns", metavar="PATH", help="the pod's network namespace")
    enroll.add_argument("--cgroup", metavar="PATH", help="the pod's cgroup2 directory")
    enroll.add_argument("--mode", choices=modes)
    enroll.add_argument(
        "--accelerate",
        choices=[choice.value for choice in Accelerate],
        help="short-circuit the bytes of steered connections (eBPF mode; default: auto)",
    )
    for option in options.OPTIONS:
        flag = f"{options.FLAG}{option.flag}"
        enroll.add_argument(flag, metavar=option.metavar, help=option.help)
    change = add("mode", _mode, "move an enrolled pod to another mode, under traffic")
    change.add_argument("name", metavar="NAME")
    change.add_argument("mode", choices=modes)
    unenroll = add("unenroll", _unenroll, "make a pod's traffic direct again")
    unenroll.add_argument("name", metavar="NAME")
    explaining = add("explain", _explain, "say where a connection would go, and by which rule")
    explain.add_arguments(explaining)
    running = add("run", _run, "keep this node's pods steered as Kubernetes asks for it")
    running.declare = _declare_run
    add("takeover", _takeover, "put every pod on this version's programs, under traffic")
    awaiting = add("await", _await, "hold a pod's start until its connections are steered")
    awaiting.declare = _declare_await
    add("uninstall", _uninstall, "remove everything from this machine's kernel")
    shown = add("demo", _demo, "steer real pods through real Envoys and show it")
    shown.declare = _declare_demo
    compared = add("compare", _compare, "compare both modes: latency and CPU price")
    compared.declare = _declare_compare
    return parser


def _check(_arguments: argparse.Namespace, context: Context) -> int:
    from redirector import check

    return check.run(context.out)


def _status(arguments: argparse.Namespace, context: Context) -> int:
    node = context.enrollment().node_status(with_maps=False)
    if arguments.output == "json":
        json.dump(report.to_json(node), context.out, indent=2)
        context.out.write("\n")
    else:
        context.out.write(report.to_text(node))
    return 1 if node.problems or any(status.missing for status in node.pods) else 0


def _declare_flows(parser: argparse.ArgumentParser) -> None:
    from redirector.flows import command

    command.add_arguments(parser)


def _flows(arguments: argparse.Namespace, context: Context) -> int:
    from redirector.flows import command

    return command.run(arguments, context.enrollment(), context.out)


def _metrics(_arguments: argparse.Namespace, context: Context) -> int:
    from redirector import metrics

    for piece in metrics.render(context.enrollment().node_status()):
        context.out.write(piece.decode())
    return 0


def _run(arguments: argparse.Namespace, context: Context) -> int:
    from redirector.agent import command

    return command.run(arguments, context.enrollment(command.tell), context.environment)


def _declare_run(parser: argparse.ArgumentParser) -> None:
    from redirector.agent import command

    command.add_arguments(parser)


def _await(arguments: argparse.Namespace, context: Context) -> int:
    from redirector import awaiting

    return awaiting.run(arguments, context.out)


def _declare_await(parser: argparse.ArgumentParser) -> None:
    from redirector import awaiting

    awaiting.add_arguments(parser)


def _compare(arguments: argparse.Namespace, context: Context) -> int:
    from redirector import compare

    return compare.run(arguments, context.out)


def _declare_compare(parser: argparse.ArgumentParser) -> None:
    from redirector import compare

    compare.add_arguments(parser)


def _bootstrap(arguments: argparse.Namespace, context: Context) -> int:
    from redirector.bootstrap import command

    def enrolled(name: str) -> str:
        known = context.enrollment().get(name).node_wide
        if not known:
            raise InputError(f"pod {name}: had no address of its own when enrolled; give it: --ip")
        return str(known[0])

    return command.run(arguments, enrolled, context.out)


def _declare_bootstrap(parser: argparse.ArgumentParser) -> None:
    from redirector.bootstrap import command

    command.add_arguments(parser)


def _proxy_status(arguments: argparse.Namespace, context: Context) -> int:
    # The control plane's own command: gRPC is not for every command of this one to import.
    from xds_server import status

    found = status.fetch(arguments.address or status.DEFAULT_ADDRESS)
    status.show(found, arguments.output, context.out)
    return 0


def _enroll(arguments: argparse.Namespace, context: Context) -> int:
    from redirector import config

    given = vars(arguments)
    flags = {name: given[name] for name in config.PLACE}
    flags |= {option.name: given[option.destination] for option in options.OPTIONS}
    flags = {name: value for name, value in flags.items() if value is not None}
    values = config.read(arguments.config) | flags if arguments.config else flags

    def written(name: str) -> str:
        if name in flags or not arguments.config:
            return options.written(options.FLAG, name)
        return f"{arguments.config}: {name}"

    missing = [name for name in ("name", "netns", "cgroup", "mode") if name not in values]
    if missing:
        raise InputError(
            f"enroll: {', '.join(missing)} must be given: as NAME, --netns, --cgroup and --mode, "
            "or in --config FILE"
        )
    steering = options.parse_written(
        {name: value for name, value in values.items() if name not in config.PLACE}, written
    )
    mode = _one_of(Mode, written("mode"), values["mode"])
    accelerate = _one_of(
        Accelerate, written("accelerate"), values.get("accelerate", Accelerate.AUTO)
    )
    netns, cgroup = Path(values["netns"]), Path(values["cgroup"])
    enrollment = context.enrollment()
    steering = with_resolvers(values["name"], steering, netns, require_cgroup(cgroup))
    pod = enrollment.enroll(values["name"], netns, cgroup, mode, accelerate, steering)
    context.out.write(f"pod {pod.name} enrolled in {pod.mode} mode\n")
    strangers = outside(pod.netns, pod.cgroup)
    if strangers and pod.mode is Mode.EBPF:
        print(
            f"redirector: pod {pod.name}: processes of its network namespace are outside of "
            f"{pod.cgroup}, so what they open is direct: {', '.join(map(str, strangers))}",
            file=sys.stderr,
        )
    return 0


def _one_of(kind: type[Choice], option: str, text: str) -> Choice:
    try:
        return kind(text)
    except ValueError:
        choices = ", ".join(kind)
        raise InputError(f"{option}: {text!r} is none of {choices}; give one of them") from None


def _mode(arguments: argparse.Namespace, context: Context) -> int:
    pod = context.enrollment().change_mode(arguments.name, Mode(arguments.mode))
    context.out.write(f"pod {pod.name} is in {pod.mode} mode\n")
    return 0


def _explain(arguments: argparse.Namespace, context: Context) -> int:
    pod = context.enrollment().get(arguments.name)
    explain.require_there(pod, arguments.interface)
    context.out.write(explain.explain(arguments, pod) + "\n")
    return 0


def _unenroll(arguments: argparse.Namespace, context: Context) -> int:
    context.enrollment().unenroll(arguments.name)
    context.out.write(f"pod {arguments.name} unenrolled\n")
    return 0


def _takeover(_arguments: argparse.Namespace, context: Context) -> int:
    enrollment = context.enrollment()
    taken, problems = enrollment.take_over()
    for problem in problems:
        print(f"redirector: {problem}", file=sys.stderr)
    context.out.write("".join(f"pod {pod.name} taken over\n" for pod in taken))
    if not taken and not problems:
        context.out.write("every pod runs this version's programs already\n")
    if enrollment.draining():
        context.out.write(
            "open connections still need an older version's maps; they go with the last of them, "
            "at the next command\n"
        )
    return 1 if problems else 0


def _uninstall(_arguments: argparse.Namespace, context: Context) -> int:
    problems = context.enrollment().uninstall()
    for problem in problems:
        print(f"redirector: {problem}", file=sys.stderr)
    context.out.write("nothing of redirector is left\n" if not problems else "")
    return 1 if problems else 0


def _demo(arguments: argparse.Namespace, context: Context) -> int:
    from redirector.demo import command

    return command.run(arguments, context.out)


def _declare_demo(parser: argparse.ArgumentParser) -> None:
    from redirector.demo import command

    command.add_arguments(parser)


if __name__ == "__main__":
    sys.exit(main())
