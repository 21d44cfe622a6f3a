"""Files written by torch, read in a separate environment, since ours has no torch.

Pickles are read with weights_only, which loads tensors and refuses code.
"""

import pathlib
import subprocess
import tempfile

import numpy as np
import safetensors.numpy

_READER = pathlib.Path(__file__).with_name("torch_reader.py")
PEERS = pathlib.Path(__file__).resolve().parents[2] / ".peers" / "bin" / "python"


def read(
    file: pathlib.Path,
    python: str | pathlib.Path = PEERS,
    probe: pathlib.Path | None = None,
) -> dict[str, np.ndarray]:
    """Returns a file's tensors by name, in the file's order, with dotted nested keys.

    Args:
      file: a pickle of tensors; with `probe` a TorchScript, which is a program and is
        run, so the caller must have checked its hash.
      python: the Python of an environment with torch and safetensors.
      probe: a safetensors file with a clip `video`; the TorchScript's output for it is
        returned as `probe`.

    Raises:
      FileNotFoundError: the file or that Python is missing.
      ValueError: the file is damaged or holds something other than tensors, or that
        Python has no torch.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "tensors.safetensors"
        command = [python, _READER, file, out, *([probe] if probe else [])]
        try:
            ended = subprocess.run(command, capture_output=True, text=True)
        except OSError:
            raise FileNotFoundError(_no_torch(python)) from None
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
            if "ModuleNotFoundError" in last:
                raise ValueError(_no_torch(python))
            raise ValueError(f"torch cannot read {file}: {last}")
        return safetensors.numpy.load_file(out)


def _no_torch(python: str | pathlib.Path) -> str:
    return (
        f"{python} is not a Python with torch and safetensors, which reading torch files "
        "needs: install launch/requirements/peers.txt into a separate environment and "
        "name its Python with --torch_python"
    )
