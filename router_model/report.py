"""``report.md``: an evaluation that a person reads in two minutes."""

from collections.abc import Mapping
from typing import Any

from router_model.evaluation import MIN_PROMPTS_FOR_VERDICT

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
    "knn": "kNN: nearest labelled prompts",
    "paper_bt": "paper's Bradley-Terry head",
    "random": "random teacher",
}
_COLUMNS = (
    "method",
    "reward",
    "quality",
    "learnability",
    "regret",
    "gap closed",
    "win / tie / loss",
    "hit@1",
    "hit@3",
)
_MAIN = ("random", "best_single", "knn", "persyn", "oracle")
_N_SHARES = 5


def summary_lines(report: Mapping[str, Any]) -> list[str]:
    """The main lines of a report, for a terminal."""
    methods = report["methods"]
    persyn = methods["persyn"]
    return [
        f"verdict: {report['verdict']}",
        *([f"note: {report['notes'][0]}"] if report["fallen_back"] else []),
        f"gap to the oracle closed: {gap_text(persyn['gap_closed'])}   "
        f"({report['n_prompts']} held-out prompts, {report['n_teachers']} teachers, "
        f"alpha {report['alpha']:g}, head {report['head']})",
        "mean reward:  "
        + "   ".join(f"{name} {methods[name]['mean_reward']:.3f}" for name in _MAIN if name in methods),
        f"best single teacher: {_best_single(report)}",
        "share per teacher:  " + "   ".join(_shares(persyn["share"], n_most=len(persyn["share"]))),
        f"labels: {report['label_advice']['text']}",
    ]


def _best_single(report: Mapping[str, Any]) -> str:
    """Its id. Where it has no response another one stands in, so the one with the largest share."""
    shares: Mapping[str, float] = report["methods"]["best_single"]["share"]
    return max(shares, key=shares.__getitem__)


def _shares(share_of: Mapping[str, float], *, n_most: int) -> list[str]:
    """The largest shares, then how much is left for how many; who answers nothing is only counted."""
    asked = sorted(((name, share) for name, share in share_of.items() if share), key=lambda pair: -pair[1])
    rest, n_silent = asked[n_most:], len(share_of) - len(asked)
    return [
        *(f"{name} {share:.0%}" for name, share in asked[:n_most]),
        *([f"{len(rest)} others together {sum(share for _, share in rest):.0%}"] if rest else []),
        *([f"{n_silent} never asked"] if n_silent else []),
    ]


def gap_text(gap: Mapping[str, Any]) -> str:
    """Share of the gap with its interval."""
    if gap["value"] is None:
        return "no gap: the best single teacher is the oracle"
    low, high = gap["ci95"]
    return f"{gap['value']:.1%} [95 % interval {low:.1%} to {high:.1%}]"


def report_markdown(report: Mapping[str, Any]) -> str:
    """The whole report. Pictures are named as ``plots.write_plots`` writes them."""
    sections = [
        *_head(report),
        *_methods(report),
        *_who_answers(report),
        *_alpha(report),
        *_labels(report),
        *_trust(report),
        *_notes(report),
    ]
    return "\n".join([*sections, ""])


def _head(report: Mapping[str, Any]) -> list[str]:
    persyn = report["methods"]["persyn"]
    duel = persyn["versus_best_single"]
    verdict = report["verdict"]
    return [
        f"# Does routing help {report['student']}?",
        "",
        f"**{verdict[0].upper()}{verdict[1:]}.**",
        *(["", f"{_sentence(report['notes'][0])}"] if report["fallen_back"] else []),
        "",
        f"On {report['n_prompts']} prompts that the router has not seen, with {report['n_teachers']} "
        f"teachers and alpha = {report['alpha']:g}, {_gap_sentence(persyn['gap_closed'])} Its reward is "
        f"above the best single teacher's on {duel['win']:.0%} of the prompts, equal on {duel['tie']:.0%} "
        f"and below on {duel['loss']:.0%}. Routing is said to help only if the whole interval is above zero, "
        f"on {MIN_PROMPTS_FOR_VERDICT} prompts or more.",
        "",
        f"The best single teacher, chosen on the training prompts, is `{_best_single(report)}`.",
        "",
    ]


def _gap_sentence(gap: Mapping[str, Any]) -> str:
    if gap["value"] is None:
        return "there is no gap to close: the best single teacher is the oracle."
    return f"it closes {gap_text(gap)} of the gap between the best single teacher and the oracle."


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _methods(report: Mapping[str, Any]) -> list[str]:
    methods = sorted(report["methods"].items(), key=lambda pair: -pair[1]["mean_reward"])
    return [
        f"| {' | '.join(_COLUMNS)} |",
        f"|---|{'--:|' * (len(_COLUMNS) - 1)}",
        *(_method_line(name, facts) for name, facts in methods),
        "",
        "Reward is normalised within each prompt; quality and learnability "
        f"({_MEASURES[report['learnability']]}) are raw means. Win, tie and loss are against the best single "
        "teacher. Hits mean little by themselves: compare them with those of the random and the best single "
        "teacher.",
        "",
        "![Reward of each method](methods.png)",
        "",
        "![Wins, ties and losses against the best single teacher](win_tie_loss.png)",
        "",
    ]


def _method_line(name: str, facts: Mapping[str, Any]) -> str:
    gap, learnability, duel = facts["gap_closed"], facts["mean_learnability"], facts["versus_best_single"]
    cells = [
        _NAMES.get(name, name),
        f"{facts['mean_reward']:.3f}",
        f"{facts['mean_quality']:.3f}",
        "-" if learnability is None else f"{learnability:.3f}",
        f"{facts['regret']:.3f}",
        "-" if gap["value"] is None else f"{gap['value']:.1%} [{gap['ci95'][0]:.1%}, {gap['ci95'][1]:.1%}]",
        f"{duel['win']:.0%} / {duel['tie']:.0%} / {duel['loss']:.0%}",
        f"{facts['hit_at_1']:.0%}",
        f"{facts['hit_at_3']:.0%}",
    ]
    return f"| {' | '.join(cells)} |"


def _who_answers(report: Mapping[str, Any]) -> list[str]:
    shares = _shares(report["methods"]["persyn"]["share"], n_most=_N_SHARES)
    return [
        "## Who answers",
        "",
        f"{', '.join(shares)}.",
        "",
        "![Share of prompts per teacher](shares.png)",
        "",
    ]


def _alpha(report: Mapping[str, Any]) -> list[str]:
    curve = report["curves"]["alpha"]
    if not curve:
        return []
    first, last = curve[0], curve[-1]
    fallen = [f"{point['alpha']:g}" for point in curve if not point["helps"]]
    where = "every alpha" if len(fallen) == len(curve) else f"alpha = {', '.join(fallen)}"
    return [
        "## Other weights of learnability",
        "",
        "From alpha = 0 to 1 the chosen responses' mean quality goes from "
        f"{first['mean_quality']:.3f} to {last['mean_quality']:.3f}, their mean learnability from "
        f"{first['mean_learnability']:.3f} to {last['mean_learnability']:.3f}. Each gap is measured by the "
        "reward of its own alpha: the curve shows where routing works, not which alpha makes the better "
        "student." + (f" The router falls back to the best single teacher at {where}." if fallen else ""),
        "",
        "![Gap closed, quality and learnability at each alpha](alpha.png)",
        "",
    ]


def _labels(report: Mapping[str, Any]) -> list[str]:
    picture = ["![Regret and labelled prompts](labels.png)", ""] if report["curves"]["labels"] else []
    return ["## Would more labels pay?", "", report["label_advice"]["text"], "", *picture]


def _trust(report: Mapping[str, Any]) -> list[str]:
    calibration, conformal = report["calibration"], report["conformal"]
    accuracy = calibration["pairwise_accuracy"]
    ordered = "" if accuracy is None else f"; {accuracy:.0%} of the pairs are ordered rightly"
    lines = [
        "## Do the probabilities mean what they say?",
        "",
        f"Pairwise calibration error {calibration['pairwise_ece']:.3f}, log-loss "
        f"{calibration['pairwise_log_loss']:.3f} (0.693 is a coin){ordered}. "
        f"{report['out_of_distribution']:.0%} of the prompts are unlike those of the training.",
        "",
    ]
    if conformal is not None:
        lines += [
            "The conformal set of a prompt, which should hold a best teacher for "
            f"{conformal['coverage_stated']:.0%} of the prompts, holds one for "
            f"{conformal['coverage_measured']:.0%}; it has {conformal['mean_set_size']:.1f} of "
            f"{report['n_teachers']} teachers on average. The smaller, the surer is the router.",
            "",
        ]
    return [*lines, "![Predicted and observed win rates](reliability.png)", ""]


def _notes(report: Mapping[str, Any]) -> list[str]:
    notes = report["notes"][1 if report["fallen_back"] else 0 :]
    return [
        f"Checkpoint `{report['checkpoint_id']}`, head `{report['head']}`, trained on "
        f"{report['n_training_prompts']} prompts.",
        *(f"\n- {note}" for note in notes),
    ]
