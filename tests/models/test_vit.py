"""Vision transformers beside the public ones, on tiny random weights."""

import dataclasses
import json
import pathlib
import re
import subprocess

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from sora_jax.models import vit, vit_exchange

ORACLE = pathlib.Path(__file__).resolve().parent.parent / "oracle"


@dataclasses.dataclass(frozen=True)
class Case:
    config: dict
    weights: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]

    @property
    def video(self) -> np.ndarray:
        return np.moveaxis(self.inputs["video"], 2, -1)


@pytest.fixture(scope="module")
def cases(peers_python, tmp_path_factory) -> dict[str, Case]:
    out = tmp_path_factory.mktemp("vits")
    subprocess.run([peers_python, ORACLE / "vits.py", out], check=True)
    loaded = {}
    for path in out.glob("*.json"):
        groups = {"weight": {}, "in": {}, "out": {}}
        for key, array in load_file(path.with_suffix(".safetensors")).items():
            group, _, rest = key.partition("/")
            groups[group][rest] = array
        loaded[path.stem] = Case(json.loads(path.read_text()), *groups.values())
    return loaded


VIDEOMAE = {
    "model_type": "videomae", "num_frames": 4, "image_size": 32, "patch_size": 16,
    "tubelet_size": 2, "hidden_size": 24, "num_hidden_layers": 2, "hidden_act": "gelu",
    "num_attention_heads": 3, "intermediate_size": 48, "layer_norm_eps": 1e-6,
}  # fmt: skip
VJEPA = VIDEOMAE | {
    "model_type": "vjepa2", "frames_per_clip": 4, "crop_size": 32, "mlp_ratio": 2.0,
    "num_pooler_layers": 1,
}  # fmt: skip
_HALF = VIDEOMAE | {"vocab_size": 9, "max_position_embeddings": 5}
CLIP = {"model_type": "clip", "projection_dim": 8, "text_config": _HALF}
CLIP |= {"vision_config": _HALF}


@pytest.mark.parametrize(
    "theirs, name, values",
    [
        (VIDEOMAE, "num_frames", (0, "4", None, True, 1e9)),
        (VIDEOMAE, "hidden_act", ("silu", [], None)),
        (VIDEOMAE, "layer_norm_eps", (0, -1e-6, "x", float("nan"))),
        (VIDEOMAE, "num_hidden_layers", (10**9, 2.5, [2])),
        (VIDEOMAE, "quantization_config", ({"bits": 4},)),
        (VJEPA, "mlp_ratio", (0, float("inf"), "4")),
        (VJEPA, "crop_size", (-1, {})),
        (CLIP, "text_config", (None, [], 3)),
        (CLIP, "projection_dim", (0, 1.5)),
        (CLIP, "vision_config", (_HALF | {"patch_size": 0},)),
        (CLIP, "text_config", (_HALF | {"eos_token_id": "x"},)),
    ],
)
def test_a_wrong_field_of_a_config_is_refused(theirs, name, values):
    for value in values:
        with pytest.raises(ValueError, match=r"^config\.json: .* is ") as error:
            vit_exchange.read_transformers(theirs | {name: value}, {})
        assert "weights of" not in str(error.value)
    without = {n: v for n, v in theirs.items() if n != name}
    if name in theirs:
        with pytest.raises(ValueError, match=f"config.json lacks {name}"):
            vit_exchange.read_transformers(without, {})
    # All is right but the tensors, and a field that is not known changes nothing.
    with pytest.raises(ValueError, match="do not fit the config; missing: "):
        vit_exchange.read_transformers(theirs | {"newer": [1]}, {})


def transformers_parts(case: Case, build):
    _, parts = vit_exchange.read_transformers(case.config, case.weights)
    kinds = {"video": vit.VisionTransformer, "vision": vit.VisionTransformer}
    kinds["text"] = vit.TextTransformer
    return {
        part: build(lambda p=part, c=config: kinds[p](c, nnx.Rngs(0)), params)
        for part, (config, params) in parts.items()
    }


@pytest.mark.peers
@pytest.mark.parametrize("name", ["videomae", "videomae_mean", "vjepa_2"])
def test_transformers_networks(cases, name, build, close):
    case = cases[name]
    network = transformers_parts(case, build)["video"]
    close(f"{name}, tokens", network.tokens(case.video), case.outputs["tokens"])
    features = jax.jit(lambda network, video: network(video))(network, case.video)
    wanted = case.outputs.get("features")
    if wanted is None:  # VideoMAE without a classifier: the mean of normed tokens
        wanted = case.outputs["tokens"].mean(axis=1)
    close(f"{name}, features", features, wanted)


@pytest.mark.peers
def test_clip(cases, build, close):
    case = cases["clip"]
    parts = transformers_parts(case, build)
    pictures = np.moveaxis(case.inputs["pixels"], 1, -1)[:, None]
    found = parts["vision"](pictures), parts["text"](case.inputs["ids"])
    close("CLIP, pictures", found[0], case.outputs["vision"])
    close("CLIP, texts", found[1], case.outputs["text"])
    unit = [np.asarray(x) / np.linalg.norm(x, axis=1, keepdims=True) for x in found]
    close("CLIP, cosines", unit[0] @ unit[1].T, case.outputs["cosine"])
    # What stands behind the end of a text changes nothing.
    behind = case.inputs["ids"].copy()
    behind[0, 4:] = 5
    close("CLIP, padded", parts["text"](behind)[0], case.outputs["text"][0])


@pytest.mark.peers
def test_the_files_of_cd_fvd_and_jedi(cases, build, close):
    for name in ("videomae_v2", "vjepa_1"):
        case, config = cases[name], dict(cases[name].config)
        if name == "videomae_v2":
            known = vit_exchange.VIDEOMAE_V2_G
            config = dataclasses.replace(known, **config)
            params = vit_exchange.read_videomae_v2(case.weights, config)
        else:
            config["patch"] = tuple(config["patch"])
            config = dataclasses.replace(vit_exchange.VJEPA_H, **config)
            params = vit_exchange.read_vjepa_1(*jedi_files(case.weights), config)
        network = build(lambda c=config: vit.VisionTransformer(c, nnx.Rngs(0)), params)
        close(name, network(case.video), case.outputs["features"])


def jedi_files(weights) -> tuple[dict, dict]:
    """A case's weights under the names that are in JEDi's two files."""
    encoder = {
        n.replace("encoder.", "module.backbone.", 1): a
        for n, a in weights.items()
        if n.startswith("encoder.")
    }
    probe = {
        n.replace("probe.", "module.", 1): a
        for n, a in weights.items()
        if n.startswith("probe.")
    }
    return encoder, probe


@pytest.mark.peers
def test_tensors_without_a_place_are_named(cases):
    case = cases["videomae_mean"]
    name = "videomae.encoder.layer.1.output.dense.bias"
    fewer = {n: a for n, a in case.weights.items() if n != name}
    with pytest.raises(ValueError, match=f"missing: {re.escape(name)}"):
        vit_exchange.read_transformers(case.config, fewer)
    more = case.weights | {"videomae.extra.weight": case.weights[name]}
    with pytest.raises(ValueError, match="unexpected: videomae.extra.weight"):
        vit_exchange.read_transformers(case.config, more)
    other = case.weights | {name: np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match=r"dense.bias \(3,\) instead of \(24,\)"):
        vit_exchange.read_transformers(case.config, other)
    encoder, probe = jedi_files(cases["vjepa_1"].weights)
    with pytest.raises(ValueError, match="V-JEPA do not fit .* of another shape"):
        vit_exchange.read_vjepa_1(encoder, probe)  # not of V-JEPA-H's size
    with pytest.raises(ValueError, match="model_type is 'vivit'; it must be videomae"):
        vit_exchange.read_transformers({"model_type": "vivit"}, {})


@pytest.mark.peers
def test_older_names_of_biases(cases):
    case = cases["videomae"]
    older = {
        re.sub(r"\.query\.bias$", ".q_bias", re.sub(r"\.value\.bias$", ".v_bias", n)): a
        for n, a in case.weights.items()
    }
    assert older.keys() != case.weights.keys()
    found, wanted = (
        vit_exchange.read_transformers(case.config, w)[1]["video"][1]
        for w in (older, case.weights)
    )
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_clips_of_another_size_are_refused(build):
    config = vit.Config(
        num_frames=2, size=4, patch=(1, 2, 2), dim=8, num_layers=1, num_heads=2
    )
    network = build(lambda: vit.VisionTransformer(config, nnx.Rngs(0)))
    assert network(np.zeros((1, 2, 4, 4, 3), np.float32)).shape == (1, 8)
    with pytest.raises(ValueError, match=r"takes clips of \(2, 4, 4, 3\), not \(3, 4"):
        network(np.zeros((1, 3, 4, 4, 3), np.float32))


@pytest.mark.parametrize(
    "field", [{"pool": "max"}, {"positions": "none"}, {"activation": "relu"}]
)
def test_forms_are_checked(field):
    (name,) = field
    with pytest.raises(ValueError, match=f"{name} is .* must be one of"):
        vit.Config(**field)
