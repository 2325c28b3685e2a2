"""Examples of requests and answers, for the OpenAPI document."""

import json
from typing import Any

ROUTE_REQUESTS: dict[str, Any] = {
    "simple": {"summary": "One prompt", "value": {"prompts": ["Name three rivers as bullets."]}},
    "learnable": {
        "summary": "Learnability alone decides, among two teachers",
        "value": {
            "prompts": [{"id": "p1", "prompt": "Name three rivers as bullets."}],
            "teachers": ["large", "small"],
            "alpha": 1.0,
        },
    },
    "cheap": {
        "summary": "A dollar of expected cost outweighs 200 of strength",
        "value": {"prompts": ["Name three rivers as bullets."], "cost_weight": 200.0},
    },
    "mix": {
        "summary": "Half of the prompts to the strongest teacher",
        "value": {"prompts": ["Name three rivers."], "strategy": "mix", "mix_strong_share": 0.5, "seed": 7},
    },
}

ROUTE_RESPONSE: dict[str, Any] = {
    "checkpoint_id": "9f2c7c1e",
    "student": "qwen2.5-0.5b",
    "strategy": "persyn",
    "alpha": 0.4,
    "coverage": 0.9,
    "decisions": [
        {
            "id": "p1",
            "teacher": "large",
            "distribution": {"large": 0.622, "small": 0.378},
            "strengths": {"large": 0.25, "small": -0.25},
            "quality": {"large": 0.7, "small": 0.6},
            "learnability": {"large": -0.9, "small": -1.1},
            "expected_reward": {"large": 0.6, "small": 0.5},
            "propensity": 1.0,
            "margin": 0.5,
            "uncertain": False,
            "conformal_set": ["large"],
            "out_of_distribution": False,
            "input_tokens": 7,
            "truncated": False,
        }
    ],
}

ROUTE_LINES = '"Name three rivers as bullets."\n{"id": "p2", "prompt": ""}\n'
ROUTED_LINES = "".join(
    json.dumps(line) + "\n"
    for line in (
        {**ROUTE_RESPONSE["decisions"][0], "status": "ok", "line": 1, "checkpoint_id": "9f2c7c1e"},
        {
            "id": "p2",
            "status": "error",
            "line": 2,
            "error": {
                "type": "urn:persyn:problem:invalid-request",
                "title": "The request is invalid",
                "detail": "the prompt has no text",
                "source": "client",
                "retryable": False,
            },
        },
        {
            "ok": 1,
            "failed": 1,
            "lines": 2,
            **{name: ROUTE_RESPONSE[name] for name in ("checkpoint_id", "student", "strategy", "alpha")},
            "coverage": 0.9,
            "error": None,
        },
    )
)

SYNTHESIZE_REQUESTS: dict[str, Any] = {
    "simple": {"summary": "One prompt", "value": {"prompts": ["Name three rivers as bullets."]}},
    "sampled": {
        "summary": "Two answers each, by a teacher that is drawn",
        "value": {
            "prompts": ["Name three rivers.", "Name three lakes."],
            "temperature": 1.0,
            "seed": 7,
            "sampling": {"n": 2, "max_tokens": 256},
        },
    },
}
