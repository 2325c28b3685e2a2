"""Stage ``collect``: every teacher answers every calibration prompt."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clients.canonical import content_hash
from clients.types import Assignment, Prompt, TeacherSpec
from router_model.errors import PipelineError
from router_model.pipeline.artifacts import locked_folder, read_journal, record_stage, write_jsonl
from router_model.pipeline.config import ProjectFile, QualitySection
from router_model.pipeline.generation import GenerationResult, answers_by_key, generate, request_key
from router_model.pipeline.progress import Progress
from router_model.pipeline.prompts import read_prompts, sample_prompts
from router_model.quality import ExactAnswerScorer, QualityScorer, RewardModelScorer, VerifiableScorer

PROMPTS_FILE = "collected_prompts.jsonl"
RESPONSES_FILE = "responses.jsonl"
FAILURES_FILE = "failures.jsonl"


def collect(
    project: ProjectFile, run_folder: Path, *, progress: Progress, prompts_path: Path | None = None
) -> GenerationResult:
    """Let every teacher answer every calibration prompt; answers of an earlier call are kept.

    The prompts are checked against the quality scorer first: an answer that cannot be judged is money lost.

    Raises:
        ConfigurationError: A teacher's key is missing.
        TableError, QualityError: The prompt file is malformed; nothing has been asked.
        PipelineError: Another process works in the folder, or the disk is full.
    """
    specs = project.teacher_specs()
    prompts = calibration_prompts(project, prompts_path)
    scorer = quality_scorer(project.quality)
    for prompt in prompts:
        scorer.check(prompt)
    assignments = calibration_assignments(prompts, specs)
    with locked_folder(run_folder):
        # The later stages judge these prompts, wherever they came from.
        write_jsonl(run_folder / PROMPTS_FILE, [asdict(prompt) for prompt in prompts])
        result = generate(specs, assignments, run_folder / RESPONSES_FILE, stage="collect", progress=progress)
        write_jsonl(run_folder / FAILURES_FILE, [asdict(failure) for failure in result.failures])
        record_stage(
            run_folder,
            "collect",
            {"requests": content_hash([request_key(*pair) for pair in zip_specs(specs, assignments)])},
            {
                "n_prompts": len(prompts),
                "n_teachers": len(specs),
                "n_answers": len(assignments) - len(result.failures),
                "n_failures": len(result.failures),
            },
        )
    return result


def calibration_prompts(project: ProjectFile, prompts_path: Path | None = None) -> list[Prompt]:
    """The prompts that the project file names, or those of another file, sampled as it says."""
    prompts = read_prompts(prompts_path or Path(project.calibration.prompts))
    return sample_prompts(prompts, project.calibration.sample, project.calibration.seed)


def calibration_assignments(prompts: Sequence[Prompt], specs: Sequence[TeacherSpec]) -> list[Assignment]:
    """Every prompt to every teacher, prompt by prompt: a run cut short has whole rows."""
    return [Assignment(prompt, spec.id) for prompt in prompts for spec in specs]


def zip_specs(
    specs: Sequence[TeacherSpec], assignments: Sequence[Assignment]
) -> list[tuple[TeacherSpec, Assignment]]:
    """Each assignment with its teacher."""
    by_id = {spec.id: spec for spec in specs}
    return [(by_id[assignment.teacher], assignment) for assignment in assignments]


def collected_prompts(run_folder: Path) -> list[Prompt]:
    """The prompts of the last ``collect`` in this folder.

    Raises:
        PipelineError: There was none.
    """
    rows = list(read_journal(run_folder / PROMPTS_FILE))
    if not rows:
        raise PipelineError(f"{run_folder}: holds no collected prompts; run `persyn collect` first")
    return [Prompt(row["id"], tuple(row["messages"]), row["extra"]) for row in rows]


def collected_answers(
    specs: Sequence[TeacherSpec], prompts: Sequence[Prompt], run_folder: Path
) -> list[tuple[Prompt, TeacherSpec, dict[str, Any]]]:
    """The answers that ``collect`` has journalled for these very requests.

    Raises:
        PipelineError: There is none.
    """
    answers = answers_by_key(run_folder / RESPONSES_FILE)
    found = [
        (assignment.prompt, spec, answers[key])
        for spec, assignment in zip_specs(specs, calibration_assignments(prompts, specs))
        if (key := request_key(spec, assignment)) in answers
    ]
    if not found:
        raise PipelineError(
            f"{run_folder}: holds no answers to these prompts by these teachers; run `persyn collect` first"
        )
    return found


def quality_scorer(section: QualitySection) -> QualityScorer:
    """The scorer that the project file asks for. A reward model is loaded with its first use."""
    if section.kind == "verifiable":
        return VerifiableScorer()
    if section.kind == "exact_answer":
        return ExactAnswerScorer()
    return RewardModelScorer(section.model or "")
