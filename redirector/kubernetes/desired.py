"""What the objects ask for: which pods are steered, and how. Pure."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from redirector import options
from redirector.errors import InputError
from redirector.kubernetes.objects import NamespaceObject, PodObject
from redirector.model import (
    ANNOTATION,
    IMPORTS,
    OUTBOUND_POLICY,
    Accelerate,
    Mode,
    Steering,
)

MODE, ACCELERATE = "mode", "accelerate"
#: The value of the mode annotation that asks for no steering.
NONE = "none"
#: Kubernetes' own: there the agent's default asks for nothing, only an annotation does.
SYSTEM = frozenset({"kube-system", "kube-public", "kube-node-lease"})
#: What the control plane reads.
_OTHERS = (IMPORTS, OUTBOUND_POLICY)
_NAMES = (MODE, ACCELERATE, *(option.name for option in options.OPTIONS), *_OTHERS)


@dataclass(frozen=True)
class Wish:
    """A pod that is to be steered."""

    pod: PodObject
    mode: Mode
    accelerate: Accelerate
    steering: Steering


@dataclass(frozen=True)
class Refusal:
    """A pod whose traffic is left as it is, and why: a line that names pod, annotation, value."""

    pod: PodObject
    text: str


class Rest(StrEnum):
    """Why a pod is not to be steered, without anything being wrong."""

    NOT_ASKED = "nobody asks for it"
    FINISHED = "its containers have ended"


#: What is to become of a pod; None: not known yet, leave it as it is.
Verdict = Wish | Refusal | Rest | None


def desired(
    pods: Iterable[PodObject],
    namespaces: Mapping[str, NamespaceObject],
    default: Mode | None,
    accelerate: Accelerate = Accelerate.AUTO,
) -> dict[str, Verdict]:
    """Return each pod's verdict, by the pod's full name; the last two where nothing is said."""
    return {
        pod.full_name: _judge(pod, namespaces.get(pod.namespace), default, accelerate)
        for pod in pods
    }


def _judge(
    pod: PodObject,
    namespace: NamespaceObject | None,
    default: Mode | None,
    default_accelerate: Accelerate,
) -> Verdict:
    if pod.finished:
        return Rest.FINISHED
    # The way out holds whatever else is written beside it.
    if pod.annotations.get(MODE) == NONE:
        return Rest.NOT_ASKED
    inherits = MODE not in pod.annotations
    if inherits and namespace is None:
        return None
    if pod.namespace in SYSTEM:
        default = None
    try:
        mode = _mode(pod, namespace if inherits else None, default)
        _check_names(pod)
        accelerate = _choice(pod, ACCELERATE, [str(choice) for choice in Accelerate])
        values = {k: v for k, v in pod.annotations.items() if k not in (MODE, ACCELERATE, *_OTHERS)}
        steering = _steering(pod, values)
        if mode is None:
            return Rest.NOT_ASKED
        if pod.host_network:
            asked = not inherits or (namespace is not None and MODE in namespace.annotations)
            if not asked:
                return Rest.NOT_ASKED
            raise InputError(
                f"pod {pod.full_name}: {ANNOTATION}{MODE}: {mode!s}: it has the node's own network "
                "(hostNetwork), which is never steered; annotate it with "
                f"{ANNOTATION}{MODE}: {NONE}"
            )
    except InputError as error:
        return Refusal(pod, str(error))
    return Wish(pod, mode, Accelerate(accelerate or default_accelerate), steering)


def _mode(pod: PodObject, namespace: NamespaceObject | None, default: Mode | None) -> Mode | None:
    values = [*map(str, Mode), NONE]
    if namespace is None:
        text = _choice(pod, MODE, values)
    elif MODE in namespace.annotations:
        text = namespace.annotations[MODE]
        if text not in values:
            raise InputError(
                f"pod {pod.full_name}: {ANNOTATION}{MODE} of namespace {namespace.name}: {text!r} "
                f"is not a mode; use one of {', '.join(values)}"
            )
    else:
        return default
    return None if text in (None, NONE) else Mode(text)


def _choice(pod: PodObject, name: str, values: list[str]) -> str | None:
    text = pod.annotations.get(name)
    if text is not None and text not in values:
        near = difflib.get_close_matches(text, values, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(
            f"pod {pod.full_name}: {ANNOTATION}{name}: {text!r} is not one of its values; {hint}"
            f"use one of {', '.join(values)}"
        )
    return text


def _check_names(pod: PodObject) -> None:
    for name, value in sorted(pod.annotations.items()):
        if name not in _NAMES:
            near = difflib.get_close_matches(name, _NAMES, 1)
            hint = f"there are {', '.join(_NAMES)}"
            if near:
                hint = f"did you mean {ANNOTATION}{near[0]}?"
            raise InputError(
                f"pod {pod.full_name}: {ANNOTATION}{name}: {value!r}: no such annotation; {hint}"
            )


def _steering(pod: PodObject, values: Mapping[str, str]) -> Steering:
    try:
        return options.parse(values)
    except InputError as error:
        raise InputError(f"pod {pod.full_name}: {error}") from None
