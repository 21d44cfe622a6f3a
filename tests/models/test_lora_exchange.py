"""Adapters in the names and layouts of diffusers' LoRA files."""

import json

import numpy as np

from sora_jax.core import trees
from sora_jax.models import lora, lora_exchange
from tests.training import tiny_folder, tiny_lora

EVERY = lora.Config(rank=3, alpha=2.0, layers=("^dit",))
NAME = "transformer.blocks.1.attn1.to_q.lora_{}.weight"


def test_there_and_back():
    """The scale is multiplied into B, in float32."""
    adapters = tiny_lora.adapters(EVERY)
    theirs = lora_exchange.export(adapters, tiny_folder.DIT, EVERY.scale)
    assert theirs[NAME.format("A")].shape == (3, 32)
    assert theirs[NAME.format("B")].shape == (32, 3)
    back = lora_exchange.restore(
        theirs, tiny_folder.DIT, lora_exchange.scales({"format": "pt"})
    )
    found, wanted = trees.flatten(back), trees.flatten(adapters)
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        scale = EVERY.scale if path.endswith(".b") else 1
        np.testing.assert_allclose(found[path], scale * value, rtol=1e-6, err_msg=path)


def test_layers_may_have_other_ranks_or_no_adapter():
    """And the names may lack the prefix, as those of a transformer alone do."""
    theirs = lora_exchange.export(
        tiny_lora.adapters(lora.Config(rank=3)), tiny_folder.DIT, 1.0
    )
    theirs = {k.removeprefix("transformer."): v for k, v in theirs.items()}
    layer = "blocks.0.attn1.to_k.lora_"
    theirs |= {f"{layer}A.weight": theirs[f"{layer}A.weight"][:1]}
    theirs |= {f"{layer}B.weight": theirs[f"{layer}B.weight"][:, :1]}
    del theirs["blocks.1.attn1.to_k.lora_A.weight"]
    del theirs["blocks.1.attn1.to_k.lora_B.weight"]
    back = lora_exchange.restore(theirs, tiny_folder.DIT, lora_exchange.scales(None))
    adapter = back["blocks"]["attn1"]["to_k"]["adapter"]
    product = np.einsum("lir,lro->loi", adapter["a"], adapter["b"])
    wanted = theirs[f"{layer}B.weight"] @ theirs[f"{layer}A.weight"]
    np.testing.assert_allclose(product[0], wanted, atol=1e-6)
    assert not product[1].any()


def metadata(**fields) -> dict:
    return {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8} | fields)}


def test_scales_are_those_of_the_metadata():
    scale = lora_exchange.scales(
        metadata(
            **{"transformer.alpha_pattern": {"^blocks.0.attn1.to_q": 2, "to_v": 1}}
        )
    )
    assert scale("blocks.0.attn1.to_q", 4) == 0.5
    assert scale("blocks.1.attn1.to_q", 4) == 2
    assert scale("blocks.1.attn2.to_v", 4) == 0.25
