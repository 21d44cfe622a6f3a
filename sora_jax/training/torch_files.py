"""Files that torch wrote, read in an environment of its own: ours has no torch.

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
    """Returns a file's tensors by name, in its order, dots between nested keys.

    Args:
      file: a pickle of tensors; where `probe` is given a TorchScript, which is a program
        and is run: the caller has checked its hash.
      python: of an environment with torch and safetensors.
      probe: a safetensors file with a clip `video`; what the TorchScript makes of it
        comes back as `probe`.

    Raises:
      FileNotFoundError: the file, or that Python, is missing.
      ValueError: the file is damaged or holds more than tensors, or that Python has no
        torch.
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
            last = (ended.stderr.strip().splitlines() or ["it ended"])[-1]
            if "ModuleNotFoundError" in last:
                raise ValueError(_no_torch(python))
            raise ValueError(f"torch cannot read {file} as what it should be: {last}")
        return safetensors.numpy.load_file(out)


def _no_torch(python: str | pathlib.Path) -> str:
    return (
        f"{python} is no Python with torch and safetensors, which its files are read "
        "with: install launch/requirements/peers.txt into an environment of its own and "
        "name its Python with --torch_python"
    )
