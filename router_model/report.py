"""``report.md``: an evaluation that a person reads in two minutes."""

from collections.abc import Mapping
from typing import Any

_MEASURES = {
    "mean_logprob": "mean log-probability, nats per token",
    "rank_surprisal": "minus the rank-surprisal ratio",
    "local_logprob": "local log-probability, nats per token",
}
_NAMES = {
    "oracle": "oracle (all teachers asked)",
    "persyn": "**PerSyn router**",
    "best_single": "best single teacher",
    "strong": "strong: best quality",
    "mix": "mix: 1 strong to 4 others",
    "family_strong": "strongest of the student's family",
    "car": "CAR: compatibility-adjusted reward",
    "random": "random teacher",
}


def summary_lines(report: Mapping[str, Any]) -> list[str]:
    """The main lines of a report, for a terminal."""
    persyn = report["methods"]["persyn"]
    shares = sorted(persyn["share"].items(), key=lambda pair: -pair[1])
    return [
        f"verdict: {report['verdict']}",
        f"gap to the oracle closed: {gap_text(persyn['gap_closed'])}   "
        f"({report['n_prompts']} held-out prompts, {report['n_teachers']} teachers, "
        f"alpha {report['alpha']:g}, head {report['head']})",
        "mean reward:  "
        + "   ".join(
            f"{name} {report['methods'][name]['mean_reward']:.3f}"
            for name in ("random", "best_single", "persyn", "oracle")
        ),
        "share per teacher:  " + "   ".join(f"{name} {share:.0%}" for name, share in shares),
    ]


def gap_text(gap: Mapping[str, Any]) -> str:
    """Share of the gap with its interval."""
    if gap["value"] is None:
        return "no gap: the best single teacher is the oracle"
    low, high = gap["ci95"]
    return f"{gap['value']:.1%} [95 % interval {low:.1%} to {high:.1%}]"


def report_markdown(report: Mapping[str, Any]) -> str:
    """The whole report."""
    methods = sorted(report["methods"].items(), key=lambda pair: -pair[1]["mean_reward"])
    calibration = report["calibration"]
    lines = [
        f"# Does routing help {report['student']}?",
        "",
        f"**{report['verdict'][0].upper()}{report['verdict'][1:]}.**",
        "",
        f"On {report['n_prompts']} prompts that the router has not seen, with {report['n_teachers']} "
        f"teachers and alpha = {report['alpha']:g}, it closes "
        f"{gap_text(report['methods']['persyn']['gap_closed'])} of the gap between the "
        "best single teacher (chosen on the training prompts) and the oracle. Routing is "
        "said to help only if the whole interval is above zero.",
        "",
        "| method | reward | quality | learnability | regret | gap closed | hit@1 | hit@3 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        *(_method_line(name, facts) for name, facts in methods),
        "",
        "Reward is normalised within each prompt; quality and learnability "
        f"({_MEASURES[report['learnability']]}) are raw means.",
        "",
        "![Reward of each method](methods.png)",
        "",
        "## Who answers",
        "",
        "![Share of prompts per teacher](shares.png)",
        "",
        "## Do the probabilities mean what they say?",
        "",
        f"Pairwise calibration error {calibration['pairwise_ece']:.3f}, log-loss "
        f"{calibration['pairwise_log_loss']:.3f} (0.693 is a coin).",
        "",
        "![Predicted and observed win rates](reliability.png)",
        "",
        f"Checkpoint `{report['checkpoint_id']}`, head `{report['head']}`, trained on "
        f"{report['n_training_prompts']} prompts.",
        *(f"\n- {note}" for note in report["notes"]),
        "",
    ]
    return "\n".join(lines)


def _method_line(name: str, facts: Mapping[str, Any]) -> str:
    gap, learnability = facts["gap_closed"], facts["mean_learnability"]
    cells = [
        _NAMES[name],
        f"{facts['mean_reward']:.3f}",
        f"{facts['mean_quality']:.3f}",
        "-" if learnability is None else f"{learnability:.3f}",
        f"{facts['regret']:.3f}",
        "-" if gap["value"] is None else f"{gap['value']:.1%} [{gap['ci95'][0]:.1%}, {gap['ci95'][1]:.1%}]",
        f"{facts['hit_at_1']:.0%}",
        f"{facts['hit_at_3']:.0%}",
    ]
    return f"| {' | '.join(cells)} |"
