"""Folders in diffusers' layout: read part by part, and refused where they are damaged."""

import dataclasses
import json
import pathlib
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sora_jax.core import digests, mesh, trees
from sora_jax.generation import cache_calibration
from sora_jax.training import pretrained, weight_files
from tests.training import tiny_folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny_folder.write(tmp_path_factory.mktemp("wan") / "folder")


@pytest.fixture
def folder(whole, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(whole, tmp_path / "folder")


@pytest.mark.parametrize("seed, name", [*enumerate(tiny_folder.CONFIGS)])
def test_what_is_written_is_read_back(whole, seed, name):
    component = pretrained.open_folder(whole).components[name]
    assert component.config == tiny_folder.CONFIGS[name]
    jax.tree.map(
        np.testing.assert_array_equal, component.load(), tiny_folder.weights(name, seed)
    )


def test_each_device_reads_its_own_part(whole):
    """On a mesh, in bfloat16: laid out by the rules; norms and tables stay float32."""
    component = pretrained.open_component(whole / "transformer", "transformer")
    layouts = component.networks.partitions()["component"]
    with jax.set_mesh(mesh.make_mesh({"fsdp": 2, "tensor": 2, "replica": 2})):
        params = component.load("bfloat16")
    found = trees.flatten(params)
    wanted = trees.flatten(tiny_folder.weights("transformer"))
    for path, layout in trees.flatten(layouts).items():
        array = found[path]
        assert array.sharding.spec == layout, path
        kept = any(part in path for part in ("norm", "table", "time_embedder"))
        assert array.dtype == (jnp.float32 if kept else jnp.bfloat16), path
        np.testing.assert_array_equal(
            np.asarray(array), wanted[path].astype(array.dtype), err_msg=path
        )
    split = found["blocks.ffn.up.kernel"].addressable_shards[0].data
    assert split.shape == (2, 16, 24)


def test_many_files_and_stored_bfloat16(whole, tmp_path):
    tensors = {
        name: array.astype(jnp.bfloat16)
        for name, array in load_file(
            whole / "transformer" / "diffusion_pytorch_model.safetensors"
        ).items()
    }
    weight_files.write(tmp_path, "diffusion_pytorch_model", tensors, max_bytes=20_000)
    shutil.copy(whole / "transformer" / "config.json", tmp_path)
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 3
    component = pretrained.open_component(tmp_path, "transformer")
    for dtype in ("bfloat16", "float32"):
        params = trees.flatten(component.load(dtype))
        for path, array in trees.flatten(tiny_folder.weights("transformer")).items():
            stored = array.astype(jnp.bfloat16).astype(params[path].dtype)
            np.testing.assert_array_equal(np.asarray(params[path]), stored)


def test_a_table_may_have_both_of_its_names(folder):
    """transformers has written either, and both."""
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    shared = tensors["shared.weight"]
    save_file(tensors | {"encoder.embed_tokens.weight": shared}, path)
    component = pretrained.open_component(path.parent, "text_encoder")
    found = component.load()["embedding"]["table"]
    np.testing.assert_array_equal(found, shared)
    save_file(tensors | {"encoder.embed_tokens.weight": shared + 1}, path)
    with pytest.raises(ValueError, match="must be equal, but they differ"):
        pretrained.open_component(path.parent, "text_encoder")


# -- damage ------------------------------------------------------------------------------


def rewrite(folder, change, name="transformer", stem="diffusion_pytorch_model"):
    path = folder / name / f"{stem}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def lose_a_tensor(folder):
    rewrite(folder, lambda t: t.pop("blocks.1.ffn.net.2.bias"))


def add_a_tensor(folder):
    rewrite(folder, lambda t: t.update({"blocks.9.bias": np.zeros(3, "f4")}))


def reshape_a_tensor(folder):
    rewrite(folder, lambda t: t.update({"proj_out.bias": np.zeros(7, "f4")}))


def store_whole_numbers(folder):
    def change(tensors):
        tensors["proj_out.bias"] = tensors["proj_out.bias"].astype(np.int8)

    rewrite(folder, change)


def cut_a_file_short(folder):
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


class Harmful:
    def __reduce__(self):
        return (pathlib.Path("/tmp/sora_jax_was_here").touch, ())


def put_a_pickle_in_its_place(folder):
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(pickle.dumps(Harmful()))


def leave_a_pickle_only(folder):
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    path.unlink()
    path.with_suffix(".bin").write_bytes(pickle.dumps(Harmful()))


def index_of(folder, **placed):
    names = load_file(folder / "text_encoder" / "model.safetensors")
    placed = dict.fromkeys(names, "model.safetensors") | placed
    path = folder / "text_encoder" / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": placed}))


def index_a_missing_tensor(folder):
    index_of(folder, **{"encoder.more": "model.safetensors"})


def index_outside_of_the_folder(folder):
    index_of(folder, **{"encoder.more": "../transformer/x.safetensors"})


def index_a_pickle(folder):
    index_of(folder, **{"encoder.more": "model.bin"})


def index_nothing(folder):
    (folder / "text_encoder" / "model.safetensors.index.json").write_text("[]")


def index_no_names(folder):
    (folder / "text_encoder" / "model.safetensors.index.json").write_text("{}")


def change_a_config(folder, component="transformer", **fields):
    path = folder / component / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def take_another_models_config(folder):
    change_a_config(folder, _class_name="CogVideoXTransformer3DModel")


def contradict_what_is_computed(folder):
    change_a_config(folder, "text_encoder", dense_act_fn="silu", newer=True)


def ask_for_an_image_encoder(folder):
    change_a_config(folder, in_channels=36, image_dim=1280)


def name_another_pipeline(folder):
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"_class_name": "WanImageToVideoPipeline"}))


def name_a_boundary_alone(folder):
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"boundary_ratio": 0.9}))


def schedule_noise(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(tiny_folder.SCHEDULER | {"prediction_type": "epsilon"}))


def take_another_scheduler(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "DDIMScheduler"}))


def break_a_config(folder):
    (folder / "vae" / "config.json").write_text("{")


def nest_a_config_deeply(folder):
    (folder / "model_index.json").write_text("[" * 100_000)


def index_the_same_tensor_twice(folder):
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    save_file(
        {"shared.weight": tensors["shared.weight"]}, path.with_name("b.safetensors")
    )
    index_of(folder, more="b.safetensors")


def index_a_file_that_is_not_there(folder):
    index_of(folder, more="b.safetensors")


def index_deeply(folder):
    path = folder / "text_encoder" / "model.safetensors.index.json"
    path.write_text('{"weight_map": ' * 100_000)


def link_a_file_to_itself(folder):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.unlink()
    path.symlink_to(path.name)


def link_a_file_to_what_is_no_file(folder):
    link = folder / "vae" / "diffusion_pytorch_model.safetensors"
    link.unlink()
    link.symlink_to("/proc/self/mem")


def claim_a_longer_header(folder):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def name_a_tensor_in_two_lines(folder):
    rewrite(folder, lambda t: t.update({"a\nb": t.pop("proj_out.bias")}))


def claim_another_place(folder):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'offsets":[0,', b'offsets":[4,', 1))


def lose_the_tokenizer(folder):
    (folder / "tokenizer" / "spiece.model").unlink()


DAMAGE = {
    lose_a_tensor: "missing: blocks.1.ffn.net.2.bias",
    add_a_tensor: "unexpected: blocks.9.bias",
    reshape_a_tensor: r"proj_out.bias \(7,\) instead of \(16,\)",
    store_whole_numbers: "proj_out.bias has numbers of type I8",
    cut_a_file_short: "safetensors is damaged",
    put_a_pickle_in_its_place: "damaged or not a safetensors file",
    leave_a_pickle_only: "model.bin is a pickle",
    index_a_missing_tensor: "encoder.more is not in model.safetensors",
    index_outside_of_the_folder: "a file of weights must be in the folder of the",
    index_a_pickle: "end in .safetensors",
    index_nothing: "index.json is damaged: it is not a JSON object",
    index_no_names: "is not an index of tensors",
    take_another_models_config: "of CogVideoXTransformer3DModel, not of Wan",
    contradict_what_is_computed: "text_encoder/config.json: dense_act_fn is 'silu'",
    ask_for_an_image_encoder: "image-to-video model .36 input channels",
    name_another_pipeline: "is of a 'WanImageToVideoPipeline'; only WanPipeline is supported",
    name_a_boundary_alone: "boundary_ratio 0.9 and no transformer_2",
    schedule_noise: "prediction_type is 'epsilon'; .* 'flow_prediction' only",
    take_another_scheduler: "is a 'DDIMScheduler'",
    break_a_config: "config.json is damaged",
    nest_a_config_deeply: "model_index.json is damaged: maximum recursion",
    index_the_same_tensor_twice: "shared.weight is in another file as well",
    index_a_file_that_is_not_there: "b.safetensors is missing, but the index names it",
    index_deeply: "index.json is damaged: maximum recursion",
    link_a_file_to_itself: "vae has no diffusion_pytorch_model.safetensors",
    link_a_file_to_what_is_no_file: "safetensors cannot be read",
    claim_a_longer_header: "is damaged or not a safetensors file",
    name_a_tensor_in_two_lines: r"'a\\nb' is not a tensor's name",
    claim_another_place: "is damaged or not a safetensors file",
    lose_the_tokenizer: "has no tokenizer.json, spiece.model or tokenizer.model",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_folders_are_refused_in_one_sentence(folder, damage, monkeypatch):
    damage(folder)

    def load(*_):
        raise AssertionError("something was loaded of a damaged folder")

    monkeypatch.setattr(pretrained.Component, "load", load)
    with pytest.raises((ValueError, OSError), match=DAMAGE[damage]) as error:
        pretrained.open_folder(folder)
    assert "\n" not in str(error.value)
    assert not pathlib.Path("/tmp/sora_jax_was_here").exists()


def test_fields_that_are_not_known_are_warned_of_once_a_folder(folder, caplog):
    """In all parts together, so that the next release of a peer locks nobody out."""
    wanted = pretrained.open_folder(folder)
    for name in ("transformer", "text_encoder", "vae"):
        change_a_config(folder, name, **{f"newer_{name}": [1, 2]})
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"newer": True}))
    for _ in range(2):
        assert pretrained.open_folder(folder).digest() == wanted.digest()
    (record,) = caplog.records
    text = record.getMessage()
    for told in ("newer_transformer = [1, 2] of ", "newer_text_encoder", "newer_vae"):
        assert told in text
    assert f"newer = True of {folder}/scheduler/scheduler_config.json" in text
    assert f"newer = True of {folder}/model_index.json" in text and "--strict" in text
    with pytest.raises(ValueError, match="not known: .*newer_transformer = .1, 2. of "):
        pretrained.open_folder(folder, strict=True)
    with pytest.raises(ValueError, match="not known: newer_vae"):
        pretrained.open_component(folder / "vae", "vae", strict=True)


def test_a_folder_is_read_after_its_step_cache_was_calibrated(folder):
    """The calibration is listed in digests.sha256, the folder's own files are not."""
    wanted = pretrained.open_folder(folder).digest()
    digests.store(folder / cache_calibration.FILE, "{}")
    assert pretrained.open_folder(folder).digest() == wanted


def test_weights_have_one_name_however_they_are_computed(whole):
    """A run's text encoder in bfloat16 is the folder's; another network is another."""
    for component in pretrained.open_folder(whole).components.values():
        assert component.computing("bfloat16").digest() == component.digest()
    transformer = pretrained.open_component(whole / "transformer", "transformer")
    config = dataclasses.replace(transformer.config, quantization="int8", remat="full")
    assert transformer.fitted(config).digest() == transformer.digest()
    config = dataclasses.replace(transformer.config, known_embedding=True)
    assert transformer.fitted(config).digest() != transformer.digest()


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("number", [np.nan, -np.inf, 1e38])
def test_impossible_weights_are_found_on_reading(folder, number, stored):
    """safetensors has no checksum: what can be seen of damage to numbers."""
    dtype = np.dtype(stored) if stored != "bfloat16" else jnp.bfloat16

    def change(tensors):
        for name, array in tensors.items():
            tensors[name] = array.astype(dtype)
        tensors["blocks.1.ffn.net.2.weight"][3, -1] = number

    with np.errstate(over="ignore"):  # in float16 1e38 is infinite
        rewrite(folder, change)
    component = pretrained.open_folder(folder).components["transformer"]
    with pytest.raises(digests.Damaged, match=r"transformer: blocks\.1\.ffn.net.2"):
        component.load("bfloat16")


def test_large_weights_are_accepted():
    """And each number beyond, wherever it lies."""
    whole = np.full(3 * weight_files._AT_ONCE + 5, -weight_files.LIMIT / 2, np.float32)
    assert weight_files.find_impossible(whole) is None
    for place in (0, weight_files._AT_ONCE, len(whole) - 1):
        spoilt = whole.copy()
        spoilt[place] = -weight_files.LIMIT
        assert weight_files.find_impossible(spoilt) == -weight_files.LIMIT


@pytest.mark.parametrize("name", tiny_folder.CONFIGS)
def test_configs_round_trip(name):
    kind = pretrained.KINDS[name]
    written = json.loads(json.dumps(kind.write_config(tiny_folder.CONFIGS[name])))
    assert kind.read_config(written, "config") == tiny_folder.CONFIGS[name]
