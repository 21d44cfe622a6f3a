"""Policies are read as they stand, and anything else in them is refused."""

import pytest

from sora_jax.data.curation import duplicates, lists, policy, stages

HEX = "ab" * 32


def read(tmp_path, text):
    path = tmp_path / "policy.toml"
    path.write_text(text, encoding="utf-8")
    return policy.read(path)


def test_an_empty_policy_keeps_everything(tmp_path):
    found = read(tmp_path, "")
    assert found == policy.Policy()
    assert found.filter and found.licences is None and found.consent is None
    assert found.stages == tuple(stages.STAGES) and found.duplicates is None


def test_a_policy_with_everything(tmp_path):
    (tmp_path / "gone.txt").write_text(f"# asked\n\nsha256:{HEX.upper()}\nhash:{HEX}\n")
    (tmp_path / "yes.txt").write_text("source:https://a.example/\n")
    found = read(
        tmp_path,
        """
        stages = ["sharpness", "motion"]
        licences = ["CC0-1.0"]
        consent_files = ["yes.txt"]
        opt_out = ["source:https://b.example/x"]
        opt_out_files = ["gone.txt"]
        [limits]
        motion = {min = 0.1, max = 2}
        sharpness = {min = 1}
        [duplicates]
        """,
    )
    assert found.stages == ("motion", "sharpness")
    assert found.licences == {"cc0-1.0"} and found.duplicates == duplicates.DISTANCE
    assert found.consent.entries == ("source:https://a.example/",)
    assert found.opt_out.entries == (
        "source:https://b.example/x", f"sha256:{HEX}", f"hash:{HEX}",
    )  # fmt: skip
    assert found.limits["motion"] == policy.Limit(0.1, 2)
    assert found.limits["sharpness"].max == float("inf")
    settings = found.settings()
    assert settings["limits"]["sharpness"] == {"min": 1}
    assert settings["stages"] == {"motion": 1, "sharpness": 1}
    changed = read(tmp_path, 'opt_out = ["source:https://b.example/y"]')
    assert changed.settings()["opt_out"] != settings["opt_out"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("filter = ", "is not TOML"),
        ("licenses = []", "licenses is unknown; did you mean licences?"),
        (
            "[limits]\nmotoin = {min = 1}",
            "limits.motoin is unknown; did you mean motion",
        ),
        ("[limits]\nmotion = {least = 1}", "limits.motion.least is unknown"),
        ("[limits]\nmotion = 1", "limits.motion is a table"),
        ("[limits]\nmotion = {}", "limits.motion is a range"),
        ("[limits]\nmotion = {min = 2, max = 1}", "limits.motion is a range"),
        ("[limits]\nmotion = {min = nan}", "limits.motion.min is a finite number"),
        ("[limits]\nmotion = {min = true}", "limits.motion.min is a finite number"),
        ('stages = ["sharpness"]\n[limits]\nmotion = {min = 1}', "a stage left out"),
        ('stages = ["beauty"]', "stages.beauty is unknown"),
        ('stages = "motion"', "stages is a list of texts"),
        ("filter = 0", "filter is true or false"),
        ("duplicates = true", "duplicates is a table"),
        ("[duplicates]\ndistance = 2", "duplicates.distance is from 0 to 1"),
        ("[duplicates]\nfar = 2", "duplicates.far is unknown"),
        ('opt_out = ["https://a.example"]', "an entry is source:URL"),
        ('opt_out = ["sha256:12"]', "sha256 has 64 hexadecimal digits"),
        ('opt_out = ["source: "]', "an entry is source:URL"),
        ('opt_out = "x"', "opt_out is a list of texts"),
        ('filter = false\nopt_out = ["source:a"]', "filter = false keeps every clip"),
        ("filter = false\nlicences = []", "filter = false keeps every clip"),
    ],
)
def test_mistakes_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match="policy.toml") as caught:
        read(tmp_path, text)
    assert message in str(caught.value)


def test_a_mistake_in_a_list_names_its_line(tmp_path):
    (tmp_path / "gone.txt").write_text("# asked\nhttps://a.example\n")
    with pytest.raises(ValueError, match=r"gone.txt:2: an entry is"):
        read(tmp_path, 'opt_out_files = ["gone.txt"]')
    with pytest.raises(FileNotFoundError):
        read(tmp_path, 'opt_out_files = ["none.txt"]')


@pytest.mark.parametrize(
    "entry, source, named",
    [
        ("https://a.example/film", "https://a.example/film", True),
        ("https://a.example/film", "http://www.A.example/film/", True),
        ("https://a.example/film", "https://a.example/film?t=3", True),
        ("https://a.example/film", "https://a.example/film/2#x", True),
        ("https://a.example/film", "https://a.example/filmed", False),
        ("https://a.example/film", "https://a.example/", False),
        ("https://a.example/Film", "https://a.example/film", False),
        ("https://a.example", "https://a.example/film", True),
        ("https://a.example", "https://a.example.org/film", False),
        ("https://v.example/watch?v=1", "https://v.example/watch?v=1&t=3", True),
        ("https://v.example/watch?v=1", "https://v.example/watch?v=12", False),
        ("a.mp4", "a.mp4 from 1.000 s", True),
        ("a.mp4", "b/a.mp4 from 1.000 s", False),
    ],
)
def test_sources_are_matched_as_people_write_them(entry, source, named):
    entries = lists.Entries((f"source:{entry}",))
    assert entries.matches([source], [""], [""]) == [[f"source:{entry}"] * named]


def test_hashes_match_within_some_bits():
    entries = lists.Entries((f"hash:{HEX}", f"sha256:{HEX}"))
    near = f"{int(HEX, 16) ^ ((1 << lists.HASH_BITS) - 1):064x}"
    far = f"{int(HEX, 16) ^ ((1 << lists.HASH_BITS + 1) - 1):064x}"
    found = entries.matches([""] * 4, ["", "", "", HEX], [near, far, "", ""])
    assert found == [[f"hash:{HEX}"], [], [], [f"sha256:{HEX}"]]
