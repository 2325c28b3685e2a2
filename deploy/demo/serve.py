"""``make serve``: the demo's teachers and the service on what ``make demo`` has made, until Ctrl-C."""

import argparse
import signal
import subprocess
import sys
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    config = folder / "persyn.yaml"
    with LocalServices(folder) as services:
        services.start_teachers()
        config.write_text(project_text(services.teacher_urls))
        command = [sys.executable, "-m", "service.cli", "serve", "-c", str(config)]
        try:
            return subprocess.run(command, check=False).returncode
        except KeyboardInterrupt:
            return 0  # Ctrl-C reached the service too, which has drained


if __name__ == "__main__":
    sys.exit(main())
