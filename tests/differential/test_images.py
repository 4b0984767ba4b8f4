import subprocess
import sys
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest

from tests.differential import judge
from tests.differential.images import Plan, Step, StepFailedError, build, make, plan

SEEDS = range(500)

# At least so many of the 500 images have the feature.
EXPECTED = {
    "single": 150, "chain": 100, "data-file": 60, "raw": 40,
    "compat-0.10": 50, "compat-1.1": 250,
    "cluster-512": 50, "cluster-1k": 15, "cluster-2k": 15, "cluster-4k": 40, "cluster-8k": 20,
    "cluster-16k": 40, "cluster-32k": 30, "cluster-64k": 60, "cluster-128k": 15, "cluster-256k": 15,
    "cluster-512k": 15, "cluster-1M": 15, "cluster-2M": 12,
    "refcount-1": 30, "refcount-2": 30, "refcount-4": 30, "refcount-8": 25, "refcount-16": 100,
    "refcount-32": 30, "refcount-64": 30,
    "compressed-zlib": 80, "compressed-zstd": 60, "converted": 30, "compressed-overwritten": 60,
    "extended-l2": 60, "subcluster-write": 40, "subcluster-zero": 30, "subcluster-discard": 30,
    "size-zero": 10, "size-tiny": 40, "size-odd": 150, "size-medium": 200,
    "depth-1": 25, "depth-2": 20, "depth-3": 15, "depth-4": 15, "subdirectory": 30, "blank-in-name": 25,
    "raw-base": 30, "raw-base-odd": 15, "overlay-longer": 50, "overlay-shorter": 30, "mixed-clusters": 60,
    "compressed-backing": 40, "zeroed-overlay": 60,
    "data-file-raw": 20, "data-file-zero": 30, "data-file-discard": 30,
    "snapshots": 80, "snapshots-1": 30, "snapshots-2": 30, "snapshots-3": 25,
    "snapshot-resize": 40, "resize-grow": 25, "resize-shrink": 15, "snapshot-applied": 15,
    "snapshot-deleted": 15,
    "preallocation-off": 200, "preallocation-metadata": 25, "preallocation-falloc": 12,
    "preallocation-full": 15,
    "lazy-refcounts": 40, "bitmaps": 50,
    "zero": 150, "zero-unmap": 150, "discard": 150, "unaligned-write": 200, "zeros-as-data": 100,
    "pattern-file": 150, "cross-cluster": 150, "cross-l2": 50,
    "raw-holes": 50, "raw-all-holes": 12, "raw-empty": 8, "raw-odd": 25,
}  # fmt: skip

# Features that a single image must have together, in at least so many of the 500.
EXPECTED_TOGETHER = {
    ("single", "extended-l2", "snapshots"): 5,
    ("single", "extended-l2", "compressed-zstd"): 5,
    ("single", "extended-l2", "compressed-zlib"): 5,
    ("single", "snapshots", "compressed-zlib"): 10,
    ("single", "cross-l2", "cluster-512"): 15,
    ("chain", "extended-l2"): 20,
    ("chain", "snapshots"): 20,
    ("chain", "raw-base-odd", "overlay-longer"): 8,
    ("chain", "data-file"): 10,
    ("data-file", "extended-l2"): 8,
    ("data-file", "bitmaps"): 8,
    ("data-file-raw", "data-file-discard"): 12,
    ("data-file-raw", "data-file-zero"): 12,
    ("bitmaps", "snapshots"): 15,
    ("compat-0.10", "snapshots"): 10,
    ("compat-0.10", "compressed-zlib"): 20,
}


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    return [plan(seed) for seed in SEEDS]


def test_the_seed_determines_the_plan(plans: list[Plan]) -> None:
    assert [plan(seed) for seed in SEEDS] == plans
    # An empty raw file is all there is to some of them.
    assert len({planned.steps for planned in plans}) > 0.98 * len(plans)


def test_another_process_plans_the_same(plans: list[Plan]) -> None:
    # The order of a set of strings differs between processes; no plan may depend on it.
    program = "from tests.differential.images import plan; print(*[plan(s).steps for s in range(500)], sep='\\n')"
    root = Path(__file__).parents[2]
    said = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, check=True, text=True)
    ours = "".join(f"{planned.steps}\n" for planned in plans)
    assert sha256(said.stdout.encode()).digest() == sha256(ours.encode()).digest()


def test_every_feature_occurs_often(plans: list[Plan]) -> None:
    counts = Counter(feature for planned in plans for feature in planned.features)
    assert set(counts) == set(EXPECTED)
    assert {name: counts[name] for name, least in EXPECTED.items() if counts[name] < least} == {}


@pytest.mark.parametrize("together", EXPECTED_TOGETHER, ids=" ".join)
def test_features_meet(plans: list[Plan], together: tuple[str, ...]) -> None:
    met = sum(planned.features.issuperset(together) for planned in plans)
    assert met >= EXPECTED_TOGETHER[together]


def test_plans_avoid_what_qemu_refuses(plans: list[Plan]) -> None:
    for planned in plans:
        for step in planned.steps:
            if "create" not in step.words or "qcow2" not in step.words:
                continue
            options = step.words[step.words.index("-o") + 1].split(",")
            if "compat=0.10" in options:
                assert not any(option.startswith(("refcount", "compression", "ext")) for option in options)
            assert ("-b" in step.words) == ("-F" in step.words)
            assert not ("data_file_raw=on" in options and "-b" in step.words)


def test_names_are_relative_and_listed(plans: list[Plan]) -> None:
    for planned in plans:
        assert planned.path in planned.files
        assert len(set(planned.files)) == len(planned.files)
        assert not any(Path(name).is_absolute() for name in planned.files)


def test_a_command_is_quoted_for_a_shell() -> None:
    step = Step(("qemu-io", "-c", "write 0 512", "a disk.raw"))
    assert str(step) == "qemu-io -c 'write 0 512' 'a disk.raw'"
    assert str(Step(("seq", "1", "3"), "lines.txt")) == "seq 1 3 > lines.txt"


# Of every shape a few, with snapshots, data files, long chains, and compression among them.
BUILT = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)


@judge.needs_qemu
@pytest.mark.parametrize("seed", BUILT)
def test_an_image_is_built_and_is_sound(seed: int, tmp_path: Path) -> None:
    image = make(seed, tmp_path)
    for name in image.files:
        assert (image.directory / name).is_file()
    for name in image.files:
        if name.endswith(".qcow2"):
            checked = judge.check(name, cwd=image.directory, fmt="qcow2")
            assert (checked.rc, checked.err) == (0, "")
    if image.format == "qcow2":
        rows = judge.comparable_snapshots(judge.snapshot_list(image.path, cwd=image.directory))
        assert sorted(row["tag"] for row in rows) == sorted(image.snapshots)


@judge.needs_qemu
@pytest.mark.parametrize("seed", BUILT[:4])
def test_the_commands_make_the_same_by_hand(seed: int, tmp_path: Path) -> None:
    image = make(seed, tmp_path)
    by_hand = tmp_path / "by hand"
    by_hand.mkdir()
    subprocess.run(["sh", "-e", "-c", "\n".join(image.commands)], cwd=by_hand, check=True)
    digests = [
        judge.raw_bytes_digest(image.path, cwd=directory, fmt=image.format)
        for directory in (image.directory, by_hand)
    ]
    assert digests[0] == digests[1]


@judge.needs_qemu
def test_a_command_that_fails_is_told(tmp_path: Path) -> None:
    words = ("qemu-img", "create", "-q", "-f", "qcow2", "disk.qcow2", "many")
    broken = Plan(0, "disk.qcow2", "qcow2", ("disk.qcow2",), (Step(words),), (), frozenset())
    with pytest.raises(StepFailedError, match=r"qemu-img create .*: exit code 1: qemu-img: "):
        build(broken, tmp_path / "new")
