"""``make serve``: the demo's teachers and the service on what ``make demo`` has made, until Ctrl-C."""

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from local import LocalServices, project_text


def main() -> int:
    """Serve until the service ends; its exit code is this one's."""
    parser = argparse.ArgumentParser(description="Serve the demo's project.")
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"), help="what the demo has written")
    folder: Path = parser.parse_args().dir.resolve()
    if not (folder / "checkpoint").is_dir():
        print(f"{folder}: holds no router yet; run `make demo` first", file=sys.stderr)
        return 1
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    config = folder / "persyn.yaml"
    with LocalServices(folder) as services:
        services.start_teachers()
        config.write_text(project_text(services.teacher_urls))
        command = [sys.executable, "-m", "service.cli", "serve", "-c", str(config)]
        return run_until_drained(command)


def run_until_drained(command: Sequence[str]) -> int:
    """Run the service and hand on to it what should stop it; returns its exit code once it has ended."""
    # A process group of its own: Ctrl-C reaches it once, through here. A second SIGINT would cut the drain.
    service = subprocess.Popen(command, process_group=0)
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: service.send_signal(number))
        signal.signal(signal.SIGHUP, lambda *_: service.terminate())
        return service.wait()
    finally:
        if service.poll() is None:
            service.terminate()
            service.wait()


if __name__ == "__main__":
    sys.exit(main())
