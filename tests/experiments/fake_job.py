"""Stands in for the Python of a sweep's jobs: writes the results of one in no time.

What it does beside that stands in behaviour.json beside it: `fail`, arguments with which
it ends with exit code 3, after all its work; `silent`, with which it leaves no scores;
`other`, with which they are measured with other feature weights; `wait`, seconds that
it takes. Each call leaves a line in calls.txt.
"""

import hashlib
import json
import pathlib
import sys
import time

here = pathlib.Path(__file__).parent
behaviour = json.loads((here / "behaviour.json").read_text())
words = sys.argv[3:]  # after -m and the job
with open(here / "calls.txt", "a") as calls:
    calls.write(f"{sys.argv[2]} {' '.join(words)}\n")
print("at work", flush=True)
time.sleep(behaviour.get("wait", 0))
given = dict(word.removeprefix("--").split("=", 1) for word in words)
if sys.argv[2] == "sora_jax.train":
    run = pathlib.Path(given["out"])
    run.mkdir(exist_ok=True)
    rows = ({"step": step, "loss": 1 / step} for step in (1, 2))
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
elif any(word in words for word in behaviour.get("silent", [])):
    pass
else:
    guidance = float(given.get("guidance_scale", 1))
    steps = int(given.get("num_inference_steps", 10))
    other = any(word in words for word in behaviour.get("other", []))
    protocol = {
        "feature_weights": "other" if other else "these",
        "guidance_scale": guidance,
        "num_inference_steps": steps,
        "sampler": given.get("sampler", "euler"),
        "seeds": [0, 1],
    }
    right = min(40, round(steps * guidance))
    share = {"right": right, "count": 40, "value": right / 40, "low": 0, "high": 1}
    row = {"suites": {"motion": {"colour": share}}, "look": {}}
    canonical = json.dumps(protocol, sort_keys=True)
    scores = {
        "protocol": protocol,
        "digest": hashlib.sha256(canonical.encode()).hexdigest(),
        "rows": {"ground truth": row, "model, seed 0": row, "model, seed 1": row},
    }
    (pathlib.Path(given["out"]) / "scores.json").write_text(json.dumps(scores))
if any(word in words for word in behaviour.get("fail", [])):
    sys.exit(3)
