"""What the host holds while a folder is loaded, at a size that tests can afford."""

from experiments.bench import loading


def test_the_host_holds_the_weights_at_most_once(tmp_path):
    folder = tmp_path / "transformer"
    loading.write(folder, 0.2)
    floor = loading.measure("safetensors", folder)
    found = loading.measure("mesh", folder)
    assert found["devices"] == 8 and found["bytes"] >= floor["bytes"] > 1e8
    share = found["peak"] / found["bytes"]
    print(f"peak {share:.3f} of {found['bytes'] / 1e9:.2f} GB")
    assert share <= 1.3
