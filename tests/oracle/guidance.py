"""What diffusers makes of a guided velocity, as JSON on standard output.

Run by the peers' Python with JSON on standard input: {"guided", "with_text"} nested lists
[b, ...] and "share"; prints diffusers' `rescale_noise_cfg` of them.
"""

import json
import sys

import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg


def main() -> None:
    given = json.load(sys.stdin)
    guided, with_text = (torch.tensor(given[n]) for n in ("guided", "with_text"))
    found = rescale_noise_cfg(guided, with_text, guidance_rescale=given["share"])
    json.dump(found.tolist(), sys.stdout)


if __name__ == "__main__":
    main()
