"""``make demo``: the whole way on real language models, without a network, into one folder.

Teachers are served by llama.cpp on this machine. Each step is the command a user would call, so that the
demo shows nothing that is not in the product. A second run reuses what the first has made.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
from local import HERE, LocalServices, free_port, project_text

from clients.persyn import PersynClient
from router_model.pipeline.dataset import DATA_FILE
from service.decision_text import bar_chart

PROMPTS_TO_ROUTE = (
    "Reply with a JSON object that has the keys planet and moons, about Mars.",
    "List four things a beginner gardener needs, one bullet each.",
    "A slogan for a bakery, all in capital letters.",
)


def main() -> int:
    """Run the demo; the exit code is that of the first step that fails."""
    parser = argparse.ArgumentParser(description="Run PerSyn end to end on real small models.")
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"), help="where everything is written")
    folder: Path = parser.parse_args().dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    started_s = time.monotonic()
    # Also after `kill`, the teachers and the service must not stay behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with LocalServices(folder) as services:
            services.start_teachers()
            (folder / "persyn.yaml").write_text(project_text(services.teacher_urls))
            return show_everything(folder, services, started_s)
    except subprocess.CalledProcessError as error:
        return int(error.returncode)


def show_everything(folder: Path, services: LocalServices, started_s: float) -> int:
    """The steps, each under its heading."""
    config = str(folder / "persyn.yaml")
    heading("1  teachers answer, answers are judged, a router is trained and evaluated: persyn run")
    persyn("run", "-c", config)
    heading("2  the service starts, /route says which teacher suits each prompt")
    service_url = services.start_service(config, free_port())
    with PersynClient(service_url) as client:
        for decision, prompt in zip(
            client.route(list(PROMPTS_TO_ROUTE)).decisions, PROMPTS_TO_ROUTE, strict=True
        ):
            say(f"\n{prompt}")
            ranked = sorted(decision.distribution.items(), key=lambda pair: -pair[1])
            say(*(f"  {line}" for line in bar_chart(ranked)))
        heading("3  /synthesize answers one of them")
        item = client.synthesize(PROMPTS_TO_ROUTE[1]).items[0]
        say(item.model_dump_json(indent=2, include={"status", "teacher", "messages", "error"}))
    heading("4  new prompts become a data set, each answered by its teacher: persyn synthesize")
    prompts = str(HERE / "new_prompts.jsonl")
    persyn("synthesize", "-c", config, "--prompts", prompts, "--out", str(folder / "dataset"), may_miss=True)
    for row in pq.read_table(folder / "dataset" / DATA_FILE).to_pylist()[:10]:
        say(f"  [{row['teacher']}] {one_line(row['prompt'][-1]['content'], 60)}")
        say(f"      -> {one_line(row['completion'][0]['content'], 90)}")
    heading("5  where the files are")
    for name in ("persyn.yaml", "scores.parquet", "checkpoint/", "report/report.md", "dataset/"):
        say(f"  {os.path.relpath(folder / name)}")
    say("", f"{time.monotonic() - started_s:.0f} s in all. `make serve` serves this project.")
    return 0


def persyn(*arguments: str, may_miss: bool = False) -> None:
    """Call the command line. Exit code 3 (done, some items failed) passes where ``may_miss``."""
    command = [sys.executable, "-m", "service.cli", *arguments]
    code = subprocess.run(command, check=False).returncode
    if code and not (may_miss and code == 3):
        raise subprocess.CalledProcessError(code, command)


def heading(text: str) -> None:
    """A heading with space above."""
    say("", f"== {text}")


def say(*lines: str) -> None:
    """Print lines at once: steps in other processes print too."""
    print("\n".join(lines), flush=True)


def one_line(text: str, width: int) -> str:
    """The text on one line, cut to ``width``."""
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


if __name__ == "__main__":
    sys.exit(main())
