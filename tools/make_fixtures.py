"""Make the images in fixtures/ again, and the record beside each of what qemu-img says of it.

The images are made by the qemu-img and qemu-io that are first on PATH. `--judge DIR` names the folder of the
qemu-img that is asked about them: the newest at hand, for the records follow its output, and older ones say
less. All that goes into them is written here or drawn from seeded generators, and the dates of snapshots
are set, so that a second run with the same QEMU makes the same files; only the LUKS image has new keys.

The table RECIPES, in the order of making, names every fixture. tests/recorded.py says what a record holds.
"""

import argparse
import gzip
import hashlib
import json
import os
import random
import resource
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from tests.recorded import FIXTURES, holes_of, restore  # noqa: E402

PLAIN_LIMIT = 300 << 10  # bytes; longer images are stored compressed, since git stores no holes
STORED_PLAIN = {"disk.qcow2", "overlay.qcow2"}  # to be opened straight from the folder, whatever their size
SETTLED_DATE = 1714564800  # 2024-05-01 12:00:00 UTC, in seconds; each later snapshot is a day younger

SETTLED = {
    **os.environ,
    "PATH": os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin",  # mkfs.ext4 and sfdisk
    "TZ": "UTC",
    "LC_ALL": "C",
    "E2FSPROGS_FAKE_TIME": str(SETTLED_DATE),
}

COMPRESS = "qemu-img convert -m 1 -c -f raw -O qcow2"  # one cluster at a time, so that all runs agree

KIB = 1 << 10
MIB = 1 << 20


def run(command: list[str], folder: Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command inside a folder and return what it said, whatever its exit status."""
    return subprocess.run(
        command, cwd=folder, env=SETTLED, input=stdin, capture_output=True, text=True, check=False
    )


class Workshop:
    """The folder in which images are made, and the list of the commands that made the present one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made_with: list[str] = []

    def run(self, command: str, expect: int = 0, stdin: str | None = None) -> None:
        """Run a command, quoted as for a shell, and note it; stop at an exit status not expected."""
        said = command + (f" <<< {shlex.quote(stdin)}" if stdin else "")
        self.made_with.append(said)
        done = run(shlex.split(command), self.folder, stdin)
        if done.returncode != expect:
            raise SystemExit(f"{said}\nexit status {done.returncode}\n{done.stdout}{done.stderr}")

    def create(self, name: str, size: str, options: str = "", more: str = "") -> None:
        """Create a qcow2 image; `options` as for -o, `more` are arguments such as a backing file."""
        chosen = " ".join(filter(None, ["-o " + options if options else "", more, name, size]))
        self.run(f"qemu-img create -q -f qcow2 {chosen}")

    def snapshot(self, name: str, label: str) -> None:
        """Make an internal snapshot."""
        self.run(f"qemu-img snapshot -c {shlex.quote(label)} {name}")

    def io(self, name: str, *commands: str, expect: int = 0) -> None:
        """Run qemu-io commands on an image."""
        each = " ".join(f"-c {shlex.quote(command)}" for command in commands)
        self.run(f"qemu-io -f {name.rpartition('.')[2]} {each} {name}", expect)

    def text(self, seed: int, size: int) -> str:
        """Make a file of `size` bytes that compress to about a third; return its name."""
        return self._source("text", seed, size, seeded_text(seed, size))

    def noise(self, seed: int, size: int) -> str:
        """Make a file of `size` bytes that do not compress; return its name."""
        return self._source("noise", seed, size, random.Random(seed).randbytes(size))

    def write(self, name: str, start: int, length: int, seed: int, kind: str = "") -> None:
        """Write seeded text to a range in bytes; `kind` are more flags of qemu-io's write, such as -c."""
        flags = f"{kind} " if kind else ""
        self.io(name, f"write {flags}-s {self.text(seed, length)} {start} {length}")

    def settle_snapshots(self, name: str, vm_state_size: int = 0) -> None:
        """Give the snapshots fixed dates, one day apart, and a VM state size in bytes if one is wanted.

        Only a running virtual machine makes a snapshot with VM state: qemu-io writes the state itself, the
        two fields that tell its length are written here.
        """
        path = self.folder / name
        data = bytearray(path.read_bytes())
        (count,) = struct.unpack_from(">I", data, 60)
        (at,) = struct.unpack_from(">Q", data, 64)
        for number in range(count):
            id_length, name_length = struct.unpack_from(">HH", data, at + 12)
            struct.pack_into(">II", data, at + 16, SETTLED_DATE + number * 86400, 0)
            if vm_state_size:
                struct.pack_into(">I", data, at + 32, vm_state_size)
                struct.pack_into(">Q", data, at + 40, vm_state_size)
            (extra,) = struct.unpack_from(">I", data, at + 36)
            at = (at + 40 + extra + id_length + name_length + 7) // 8 * 8
        note = f", vm_state_size {vm_state_size}" if vm_state_size else ""
        self.made_with.append(f"# snapshot dates from {SETTLED_DATE} on, a day apart{note}")
        with path.open("r+b") as file:
            file.write(data)

    def copy_changes(self, name: str, old: str, new: str, unit: int, flags: Iterable[str] = ("",)) -> None:
        """Write to an image the units of `unit` bytes in which two raw files differ.

        The flags are those of qemu-io's write, and are used in turn.
        """
        flags = list(flags)
        with (self.folder / old).open("rb") as before, (self.folder / new).open("rb") as after:
            starts = [at for at, a, b in _pairs(before, after, unit) if a != b]
            for number, at in enumerate(starts):
                after.seek(at)
                source = f"{new}-at-{at}"
                (self.folder / source).write_bytes(after.read(unit))
                flag = flags[number % len(flags)]
                # QEMU compresses only into clusters that are not allocated.
                free = [f"discard {at} {unit}"] if flag == "-c" else []
                self.io(name, *free, f"write {flag} -s {source} {at} {unit}".replace("  ", " "))

    def put(self, name: str, *pieces: tuple[int, bytes], size: int) -> None:
        """Write a raw file of `size` bytes with the given bytes at the given offsets, holes between them."""
        with (self.folder / name).open("wb") as file:
            file.truncate(size)
            for start, data in pieces:
                file.seek(start)
                file.write(data)
        where = ", ".join(f"{len(data)} at {start}" for start, data in pieces)
        self.made_with.append(f"# {name}: {size} bytes, data: {where or 'none'}")

    def _source(self, kind: str, seed: int, size: int, data: bytes) -> str:
        name = f"{kind}-{seed}-{size}"
        (self.folder / name).write_bytes(data)
        note = f"# {name}: {size} bytes of {kind}, seed {seed}"
        if note not in self.made_with:
            self.made_with.append(note)
        return name


def _pairs(before: BinaryIO, after: BinaryIO, unit: int) -> Iterator[tuple[int, bytes, bytes]]:
    at = 0
    while piece := after.read(unit):
        yield at, before.read(unit), piece
        at += unit


def seeded_text(seed: int, size: int) -> bytes:
    """Lines of words, each line with its number, cut to `size` bytes."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("aeinorstlcdupmghbfyw", k=draw.randint(2, 9))) for _ in range(400)]
    lines: list[str] = []
    length = 0
    while length < size:
        lines.append(f"{seed}:{len(lines) + 1:05d} {' '.join(draw.choices(words, k=8))}\n")
        length += len(lines[-1])
    return "".join(lines).encode()[:size]


Builder = Callable[[Workshop, str], None]


@dataclass(frozen=True)
class Recipe:
    """One fixture: its file name, what it shows, how it is made and what must lie beside it.

    With `reserved`, what the file system calls holes in the made image is space reserved but not written.
    QEMU tells it from true holes by the blocks in use; the stored image has zeros there, to the same effect.
    """

    name: str
    shows: str
    build: Builder
    files: tuple[str, ...] = ()
    reserved: bool = False


# Builders. The name of the fixture that a builder makes is its second argument.


def made_along(shop: Workshop, name: str) -> None:
    """For a data file, which the builder of its image has made."""
    if not (shop.folder / name).exists():
        raise SystemExit(f"{name} should have been made by the fixture before it")
    shop.made_with.append("# made along with the image that uses it")


def raw(size: int, *ranges: tuple[int, int]) -> Builder:
    """A raw file of `size` bytes with text in the `(start, length)` ranges."""

    def build(shop: Workshop, name: str) -> None:
        shop.put(name, *((start, seeded_text(size + start, length)) for start, length in ranges), size=size)

    return build


def mixture(options: str, unit: int, size: int, zeroes: bool = True) -> Builder:
    """Data, patterns, gaps and (v3) zero clusters in an image of `size` bytes with clusters of `unit`."""

    def build(shop: Workshop, name: str) -> None:
        shop.create(name, str(size), options)
        shop.write(name, 0, 2 * unit, seed=unit)
        shop.write(name, 3 * unit + unit // 2, unit // 4, seed=unit + 1)  # a cluster written in part
        shop.io(name, f"write -P 0x5a {size - unit} {unit}")
        shop.write(name, size // 2, unit, seed=unit + 2)
        if zeroes:
            shop.io(name, f"write -z -u {5 * unit} {unit}", f"write -z {unit} {unit}")

    return build


def compressed(options: str, unit: int, count: int) -> Builder:
    """`count` clusters of text, each compressed, by one convert; the last two are never written."""

    def build(shop: Workshop, name: str) -> None:
        shop.put("text.raw", (0, seeded_text(unit, (count - 2) * unit)), size=count * unit)
        shop.run(f"{COMPRESS} -o {options} text.raw {name}")

    return build


def compressed_mixture(options: str, unit: int) -> Builder:
    """Compressed, plain, zero, unwritten and incompressible clusters, some compressed over plain."""

    def build(shop: Workshop, name: str) -> None:
        shop.create(name, str(24 * unit), options)
        for cluster in (0, 1, 2, 6, 7, 10):
            shop.write(name, cluster * unit, unit, seed=cluster, kind="-c")
        shop.write(name, 3 * unit, 2 * unit, seed=31)
        shop.io(name, f"write -c -s {shop.noise(8, unit)} {8 * unit} {unit}")  # stored as it is
        shop.io(name, f"write -z -u {11 * unit} {2 * unit}", f"write -c -P 0x77 {14 * unit} {unit}")
        shop.write(name, unit + unit // 4, unit // 4, seed=32)  # turns a compressed cluster into a plain one
        shop.write(name, 23 * unit, unit, seed=33, kind="-c")

    return build


def refcounts(bits: int) -> Builder:
    """Refcount entries of `bits` bits; wider than one bit, with a snapshot that shares clusters."""

    def build(shop: Workshop, name: str) -> None:
        shop.create(name, "512k", f"cluster_size=4k,refcount_bits={bits}")
        shop.write(name, 0, 24 * KIB, seed=bits)
        for start in (400 * KIB, 404 * KIB):
            # Two streams and the snapshot's two in one host cluster are more than two bits can count.
            shop.write(name, start, 4 * KIB, seed=bits + 100, kind="-c" if bits > 2 else "")
        if bits > 1:
            shop.snapshot(name, "shared")
            shop.write(name, 4 * KIB, 4 * KIB, seed=bits + 200)
            shop.settle_snapshots(name)

    return build


def blank(size: str, options: str = "") -> Builder:
    """An image to which nothing is written."""
    return lambda shop, name: shop.create(name, size, options)


def overlay(
    size: str, base: str, *ranges: tuple[int, int], options: str = "", zero: tuple[int, int] | None = None
) -> Builder:
    """An image over `base` with text in the `(start, length)` ranges and zeros in another."""

    def build(shop: Workshop, name: str) -> None:
        shop.create(name, size, options, f"-b {base} -F {base.rpartition('.')[2]}")
        for start, length in ranges:
            shop.write(name, start, length, seed=len(name) * 1000 + start % 997)
        if zero:
            shop.io(name, f"write -z -u {zero[0]} {zero[1]}")

    return build


def large_clusters(shop: Workshop, name: str) -> None:
    """Little data in each cluster: the stored image is to stay small."""
    shop.create(name, "15M", "cluster_size=2M")
    shop.write(name, 0, 20 * KIB, seed=1)
    shop.write(name, 4 * MIB - 6 * KIB, 12 * KIB, seed=2)
    shop.io(name, "write -P 0x5a 14M 1M", "write -z -u 8M 2M", "write -z 6M 2M")


def large_compressed(shop: Workshop, name: str) -> None:
    """Text repeated within each cluster: the stored image is to stay small."""
    shop.create(name, "7M", "cluster_size=2M,compression_type=zstd")
    source = shop.text(1, 50 * KIB)  # qemu-io repeats it
    shop.io(name, f"write -c -s {source} 0 2M", "write -c -P 0x33 4M 2M", f"write -c -s {source} 6M 1M")


def unaligned(shop: Workshop, name: str) -> None:
    shop.create(name, str(MIB + 512))
    shop.write(name, 0, 3000, seed=1)
    shop.write(name, MIB - 1024, 1536, seed=2)


def zero_clusters(shop: Workshop, name: str) -> None:
    overlay("1M", "chain-base.qcow2", options="cluster_size=16k")(shop, name)
    shop.write(name, 0, 128 * KIB, seed=5)
    shop.io(name, "write -z 16k 32k", "write -z -u 64k 32k", "write -z 300k 100k", "write -z -u 500k 4k")


def extended(shop: Workshop, name: str) -> None:
    """16 KiB clusters: subclusters of 512 bytes."""
    shop.create(name, "512k", "extended_l2=on,cluster_size=16k")
    shop.write(name, 0, 2048, seed=1)
    shop.write(name, 5 * KIB, 512, seed=2)
    shop.io(name, "write -z 1k 512", "write -z -u 8k 1k", "write -z 40k 2k", "write -z -u 64k 16k")
    shop.write(name, 100 * KIB + 512, 40 * KIB, seed=3)
    shop.io(name, "discard 112k 16k")


def extended_preallocated(shop: Workshop, name: str) -> None:
    shop.create(name, "256k", "extended_l2=on,cluster_size=16k,preallocation=metadata")
    shop.write(name, 33 * KIB, KIB, seed=1)


def extended_overlay(shop: Workshop, name: str) -> None:
    overlay("640k", "extl2.qcow2", options="extended_l2=on,cluster_size=16k")(shop, name)
    shop.write(name, 3 * KIB, 1024, seed=11)
    shop.write(name, 47 * KIB, 3 * KIB, seed=12)
    shop.io(name, "write -z 20k 1k", "write -z -u 80k 16k", "write -z -u 97k 512")
    shop.write(name, 600 * KIB, 512, seed=13)


def extended_compressed(shop: Workshop, name: str) -> None:
    shop.create(name, "512k", "extended_l2=on,cluster_size=16k,compression_type=zstd")
    for cluster in (0, 1, 2, 9):
        shop.write(name, cluster * 16 * KIB, 16 * KIB, seed=cluster, kind="-c")
    shop.write(name, 34 * KIB, 512, seed=20)
    shop.write(name, 66 * KIB, 1536, seed=21)


def data_file(options: str) -> Builder:
    """An image whose guest data lies in a file beside it."""

    def build(shop: Workshop, name: str) -> None:
        external = name.replace(".qcow2", ".raw")
        shop.create(name, "1M", f"data_file={external}{options}")
        shop.write(name, 0, 70 * KIB, seed=1)
        shop.write(name, 512 * KIB, 4 * KIB, seed=2)
        shop.io(name, "write -z -u 768k 64k", "write -z 600k 64k")

    return build


def snapshots(shop: Workshop, name: str) -> None:
    shop.create(name, "512k", "cluster_size=4k")
    for number, label in enumerate(("installed", "configured", "before upgrade")):
        shop.write(name, number * 10 * KIB, 14 * KIB, seed=number)
        shop.io(name, f"write -P {number + 1} 400k 4k")
        shop.snapshot(name, label)
    shop.write(name, 2 * KIB, 30 * KIB, seed=9)
    shop.io(name, "discard 400k 4k")
    shop.settle_snapshots(name)


def resized_snapshots(shop: Workshop, name: str) -> None:
    shop.create(name, "256k", "cluster_size=4k")
    shop.write(name, 0, 16 * KIB, seed=1)
    shop.snapshot(name, "small")
    shop.run(f"qemu-img resize -q -f qcow2 {name} 3M")
    shop.write(name, 2 * MIB, 8 * KIB, seed=2)
    shop.snapshot(name, "large")
    shop.run(f"qemu-img resize -q -f qcow2 --shrink {name} 1M")
    shop.write(name, 4 * KIB, 4 * KIB, seed=3)
    shop.settle_snapshots(name)


def vm_state(shop: Workshop, name: str) -> None:
    shop.create(name, "256k", "cluster_size=4k")
    shop.write(name, 0, 16 * KIB, seed=1)
    shop.write(name, 0, 24 * KIB, seed=2, kind="-b")
    shop.snapshot(name, "running")
    shop.write(name, 8 * KIB, 4 * KIB, seed=3)
    shop.settle_snapshots(name, vm_state_size=24 * KIB)


def bitmaps(shop: Workshop, name: str) -> None:
    shop.create(name, "2M", "cluster_size=16k")
    shop.write(name, 0, 20 * KIB, seed=1)
    shop.run(f"qemu-img bitmap --add -g 4k {name} nightly")
    shop.run(f"qemu-img bitmap --add --disable -g 64k {name} weekly")
    shop.write(name, 100 * KIB, 10 * KIB, seed=2)
    shop.write(name, 1500 * KIB, 512, seed=3)


def lazy(shop: Workshop, name: str) -> None:
    shop.create(name, "1M", "lazy_refcounts=on,cluster_size=16k")
    shop.write(name, 0, 40 * KIB, seed=1)


def lazy_dirty(shop: Workshop, name: str) -> None:
    """The writer dies after a flush: data and L2 table are written, refcounts are not."""
    lazy(shop, name)
    source = shop.text(2, 32 * KIB)
    shop.io(name, f"write -s {source} 200k 32k", "flush", "abort", expect=-6)


def preallocated(how: str) -> Builder:
    """An image of 512 KiB with this preallocation and a little data."""

    def build(shop: Workshop, name: str) -> None:
        shop.create(name, "512k", f"cluster_size=16k,preallocation={how}")
        shop.write(name, 32 * KIB, 20 * KIB, seed=1)

    return build


def encrypted(options: str) -> Builder:
    """An encrypted image with the passphrase "orchard" and a little data."""

    def build(shop: Workshop, name: str) -> None:
        secret = "--object secret,id=key,data=orchard"
        shop.create(name, "1M", f"encrypt.key-secret=key,{options}", secret)
        opened = f"driver=qcow2,encrypt.key-secret=key,file.filename={name}"
        source = shop.text(1, 8 * KIB)
        shop.run(f"qemu-io {secret} --image-opts -c 'write -s {source} 64k 8k' {opened}")

    return build


# The demo: the disk of a small machine, with a partition table and a file system.

PARTITIONS = """label: gpt
label-id: 6F4E2A10-37C5-4B58-9D1C-0A5E8C21B7D4
start=2048, size=2048, name=seed, uuid=0E7B1C55-81F6-4A0D-8F43-5D2C6B90A1E1
start=4096, size=124928, name=root, uuid=B8D7A3F2-4C19-4E6B-A2F5-91E03C7D64AA
"""
DISK_SIZE = 64 * MIB
ROOT_START = 4096 * 512
SEED_START = 2048 * 512

SEED = b"""#cloud-config
hostname: orchard
users:
  - name: mira
    groups: [sudo]
packages: [sqlite3, rsync]
"""


def os_release(version: int, name: str) -> str:
    return f'PRETTY_NAME="Debian GNU/Linux {version} ({name})"\nVERSION_ID="{version}"\nID=debian\n'


def system_log(seed: int, lines: int) -> str:
    """Lines as a system logger writes them, a few minutes apart."""
    draw = random.Random(seed)
    events = (
        "systemd[1]: Started session of mira",
        "sshd[612]: Accepted publickey for mira",
        "cron[488]: done",
    )
    minute, log = 0, ""
    for _ in range(lines):
        minute += draw.randint(1, 3)
        clock = f"{minute // 60 % 24:02d}:{minute % 60:02d}:07"
        log += f"Apr {25 + minute // 1440:02d} {clock} orchard {draw.choice(events)}\n"
    return log


def harvest(seed: int, rows: int) -> str:
    draw = random.Random(seed)
    kinds = ["Boskoop", "Cox Orange", "Elstar", "Gravenstein", "Jonagold", "Topaz"]
    table = (f"{number},{draw.choice(kinds)},{draw.randint(3, 90)}\n" for number in range(1, rows + 1))
    return "tree,variety,kilograms\n" + "".join(table)


FOLDERS = ["etc", "home", "home/mira", "srv", "srv/orchard", "var", "var/log"]
INSTALLED: dict[str, str | bytes] = {
    "etc/hostname": "orchard\n",
    "etc/os-release": os_release(12, "bookworm"),
    "etc/fstab": "PARTLABEL=root  /  ext4  defaults  0 1\n",
    "home/mira/notes.txt": "Call the nursery about the trees.\nBack up the harvest before upgrading.\n",
    "home/mira/photo.raw": random.Random(64).randbytes(90_000),
    "srv/orchard/harvest.csv": harvest(1, 6000),
    "var/log/syslog": system_log(1, 2500),
}
UPGRADED: dict[str, str | bytes] = {
    "etc/os-release": os_release(13, "trixie"),
    "var/log/syslog": system_log(1, 2600),
    "var/log/upgrade.log": "".join(f"Setting up package {number} of 900\n" for number in range(1, 901)),
}
CLONED: dict[str, str | bytes] = {
    "etc/hostname": "orchard-test\n",
    "home/mira/notes.txt": "This machine is the test copy: try the new harvest import here.\n",
    "srv/orchard/harvest-import.csv": harvest(2, 400),
}


def edit_root(shop: Workshop, image: str, files: dict[str, str | bytes], folders: Iterable[str] = ()) -> None:
    """Make folders and put files into an ext4 image, replacing those that a newly installed one has.

    Not with `mkfs.ext4 -d`: that would keep the moment at which the files were made here, and who made them.
    """
    present = set() if folders else INSTALLED.keys()
    script = [f"mkdir /{name}" for name in folders]
    script += [f"rm /{name}" for name in files if name in present]
    for name, content in files.items():
        source = shop.folder / f"{image}-{name.replace('/', '-')}"
        source.write_bytes(content if isinstance(content, bytes) else content.encode())
        source.chmod(0o644)
        script.append(f"write {source.name} /{name}")
    shop.run(f"debugfs -w -f - {image}", stdin="\n".join(script) + "\n")


def assemble(shop: Workshop, disk: str, root: str) -> None:
    """A raw disk with its partition table, the text on partition 1 and a file system on partition 2."""
    shop.put(disk, (SEED_START, SEED), size=DISK_SIZE)
    shop.run(f"sfdisk -q {disk}", stdin=PARTITIONS)
    shop.run(f"dd status=none conv=notrunc,sparse bs=64k seek={ROOT_START >> 16} if={root} of={disk}")


def demo_disk(shop: Workshop, name: str) -> None:
    features = "^has_journal,^resize_inode"
    fixed = "hash_seed=3d1f0a52-6f0e-4bb4-9a56-2c8f1e7d9b10,lazy_itable_init=1,nodiscard,root_owner=0:0"
    identity = "-L orchard-root -U 5b7f3c1e-20d4-4c8a-9f61-7e0ad2c4b395"
    shop.run(f"mkfs.ext4 -q -b 4096 -N 256 -m 0 -O {features} -E {fixed} {identity} root.ext4 61M")
    edit_root(shop, "root.ext4", INSTALLED, FOLDERS)
    assemble(shop, "installed.raw", "root.ext4")
    shop.run(f"{COMPRESS} -o cluster_size=16k installed.raw {name}")
    shop.snapshot(name, "before-upgrade")
    edit_root(shop, "root.ext4", UPGRADED)
    assemble(shop, "upgraded.raw", "root.ext4")
    shop.copy_changes(name, "installed.raw", "upgraded.raw", 16 * KIB, ("-c", "-c", ""))
    shop.settle_snapshots(name)


def demo_overlay(shop: Workshop, name: str) -> None:
    """Goes on from the files that the builder of the demo disk has left."""
    shop.create(name, "64M", "cluster_size=4k", "-b disk.qcow2 -F qcow2")
    edit_root(shop, "root.ext4", CLONED)
    assemble(shop, "cloned.raw", "root.ext4")
    shop.copy_changes(name, "upgraded.raw", "cloned.raw", 4 * KIB)


RECIPES = (
    Recipe("raw-empty.raw", "raw file of no bytes", raw(0)),
    Recipe("raw-100.raw", "raw file of 100 bytes, shorter than a sector", raw(100, (0, 100))),
    Recipe("raw-sectors.raw", "raw file of exactly 16 sectors, no holes", raw(8192, (0, 8192))),
    Recipe(
        "raw-holes.raw",
        "raw file of 1 MiB with holes at its start, inside and at its end",
        raw(MIB, (64 * KIB, 8 * KIB), (256 * KIB, 20 * KIB), (900 * KIB, 4 * KIB)),
    ),
    Recipe(
        "raw-odd.raw",
        "raw file with holes whose length is no multiple of 512 bytes",
        raw(300 * KIB + 77, (0, 12 * KIB), (128 * KIB, 10_000), (296 * KIB, 4 * KIB + 77)),
    ),
    Recipe("empty.qcow2", "virtual size of zero bytes", blank("0")),
    Recipe("blank.qcow2", "nothing was ever written", blank("1M")),
    Recipe("v2.qcow2", "version 2, 64 KiB clusters", mixture("compat=0.10", 64 * KIB, MIB, zeroes=False)),
    Recipe(
        "v2-4k.qcow2",
        "version 2, 4 KiB clusters",
        mixture("compat=0.10,cluster_size=4k", 4 * KIB, MIB, False),
    ),
    Recipe("v3.qcow2", "version 3, 64 KiB clusters, zero clusters", mixture("", 64 * KIB, MIB)),
    Recipe(
        "cluster-512.qcow2",
        "clusters of 512 bytes, several L2 tables",
        mixture("cluster_size=512", 512, 256 * KIB),
    ),
    Recipe("cluster-4k.qcow2", "clusters of 4 KiB, two L2 tables", mixture("cluster_size=4k", 4 * KIB, 4 * MIB)),
    Recipe("cluster-2m.qcow2", "clusters of 2 MiB", large_clusters),
    Recipe("unaligned.qcow2", "1 MiB + 512 bytes: the last cluster is cut off by the virtual size", unaligned),
    *(
        Recipe(
            f"refcount-{bits}.qcow2",
            f"refcounts of {bits} bits" + (", a snapshot" if bits > 1 else ""),
            refcounts(bits),
        )
        for bits in (1, 2, 4, 8, 16, 32, 64)
    ),
    Recipe("zlib-512.qcow2", "deflate in clusters of 512 bytes", compressed("cluster_size=512", 512, 80)),
    Recipe("zlib-4k.qcow2", "deflate streams packed back to back", compressed("cluster_size=4k", 4 * KIB, 48)),
    Recipe("zlib-64k.qcow2", "deflate in clusters of 64 KiB", compressed("cluster_size=64k", 64 * KIB, 8)),
    Recipe("v2-zlib.qcow2", "version 2, deflate", compressed("compat=0.10,cluster_size=4k", 4 * KIB, 24)),
    Recipe(
        "zstd-4k.qcow2",
        "zstd frames packed back to back",
        compressed("cluster_size=4k,compression_type=zstd", 4 * KIB, 48),
    ),
    Recipe(
        "zstd-64k.qcow2",
        "zstd in clusters of 64 KiB",
        compressed("cluster_size=64k,compression_type=zstd", 64 * KIB, 8),
    ),
    Recipe(
        "zstd-2m.qcow2",
        "zstd in clusters of 2 MiB",
        large_compressed,
    ),
    Recipe(
        "zlib-mixed.qcow2",
        "deflate, plain, zero, unwritten and incompressible clusters",
        compressed_mixture("cluster_size=4k", 4 * KIB),
    ),
    Recipe(
        "zstd-mixed.qcow2",
        "zstd, plain, zero, unwritten and incompressible clusters",
        compressed_mixture("cluster_size=16k,compression_type=zstd", 16 * KIB),
    ),
    Recipe("extl2.qcow2", "extended L2: data, zero and unallocated subclusters of 512 bytes", extended),
    Recipe(
        "extl2-64k.qcow2",
        "extended L2 with subclusters of 2 KiB",
        mixture("extended_l2=on", 64 * KIB, MIB),
    ),
    Recipe(
        "extl2-prealloc.qcow2",
        "extended L2: clusters with a place in the file, all subclusters unallocated but two",
        extended_preallocated,
    ),
    Recipe(
        "extl2-overlay.qcow2",
        "extended L2 over extended L2: the backing file shows through single subclusters",
        extended_overlay,
        ("extl2.qcow2",),
    ),
    Recipe(
        "extl2-zstd.qcow2",
        "extended L2 with compressed clusters, some overwritten in part",
        extended_compressed,
    ),
    Recipe("chain-base.qcow2", "the lowest of three layers", mixture("cluster_size=16k", 16 * KIB, MIB)),
    Recipe(
        "chain-mid.qcow2",
        "the middle of three layers, with larger clusters",
        overlay("1M", "chain-base.qcow2", (20 * KIB, 6 * KIB), (512 * KIB, 40 * KIB), zero=(0, 8 * KIB)),
        ("chain-base.qcow2",),
    ),
    Recipe(
        "chain-top.qcow2",
        "the top of three layers, with smaller clusters and longer than the others",
        overlay(
            "1280k",
            "chain-mid.qcow2",
            (530 * KIB, 9 * KIB),
            (1100 * KIB, KIB),
            options="cluster_size=4k",
            zero=(80 * KIB, 64 * KIB),
        ),
        ("chain-mid.qcow2",),
    ),
    Recipe(
        "longer.qcow2",
        "overlay longer than its backing file",
        overlay("1600k", "chain-base.qcow2", (1000 * KIB, 50 * KIB), options="cluster_size=16k"),
        ("chain-base.qcow2",),
    ),
    Recipe(
        "shorter.qcow2",
        "overlay shorter than its backing file",
        overlay("500k", "chain-base.qcow2", (4 * KIB, 6 * KIB), options="cluster_size=16k"),
        ("chain-base.qcow2",),
    ),
    Recipe(
        "over-raw.qcow2",
        "overlay on a raw file with holes and an odd length",
        overlay("512k", "raw-odd.raw", (130 * KIB, 3 * KIB), (290 * KIB, KIB), options="cluster_size=16k"),
        ("raw-odd.raw",),
    ),
    Recipe(
        "v2-overlay.qcow2",
        "version 2 overlay, with the backing format extension",
        overlay("1M", "v2.qcow2", (70 * KIB, 3 * KIB), options="compat=0.10,cluster_size=16k"),
        ("v2.qcow2",),
    ),
    Recipe(
        "zero.qcow2",
        "zero clusters with and without a place in the file, over a backing file with data",
        zero_clusters,
        ("chain-base.qcow2",),
    ),
    Recipe("data.qcow2", "external data file", data_file(""), ("data.raw",)),
    Recipe("data.raw", "the data file of data.qcow2", made_along),
    Recipe(
        "data-raw.qcow2",
        "external data file that is readable as raw",
        data_file(",data_file_raw=on"),
        ("data-raw.raw",),
    ),
    Recipe("data-raw.raw", "the data file of data-raw.qcow2", made_along),
    Recipe("snapshots.qcow2", "three snapshots with different contents", snapshots),
    Recipe("snapshots-resized.qcow2", "the disk had another size at each snapshot", resized_snapshots),
    Recipe("vmstate.qcow2", "VM state in a snapshot and behind the guest's bytes", vm_state),
    Recipe("bitmaps.qcow2", "two bitmaps, granularity 4 KiB and 64 KiB, the second disabled", bitmaps),
    Recipe("lazy.qcow2", "lazy refcounts, cleanly closed", lazy),
    Recipe("lazy-dirty.qcow2", "lazy refcounts, the writer was killed: the dirty bit is set", lazy_dirty),
    *(
        Recipe(f"prealloc-{how}.qcow2", f"preallocation={how}", preallocated(how), reserved=how == "falloc")
        for how in ("off", "metadata", "falloc", "full")
    ),
    Recipe(
        "luks.qcow2",
        "encrypted with LUKS, passphrase orchard",
        encrypted("encrypt.format=luks,encrypt.iter-time=10,encrypt.cipher-alg=aes-128"),
    ),
    Recipe("aes.qcow2", "encrypted the old way (aes), passphrase orchard", encrypted("encrypt.format=aes")),
    Recipe(
        "disk.qcow2",
        "a machine's disk: GPT, text on partition 1, ext4 on partition 2, a snapshot before its upgrade",
        demo_disk,
    ),
    Recipe("overlay.qcow2", "a test copy of that machine, an overlay on its disk", demo_overlay, ("disk.qcow2",)),
)


# Storing and judging.


@dataclass(frozen=True)
class Judge:
    """The QEMU that is asked about the fixtures, inside one folder."""

    program: str
    folder: Path

    def ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run qemu-img and return what it said, whatever its exit status."""
        return run([self.program, *arguments], self.folder)

    def version(self) -> str:
        """The first line of `qemu-img --version`."""
        return self.ask("--version").stdout.splitlines()[0]

    def digest(self, name: str, *chosen: str) -> str | None:
        """SHA-256 of the guest's bytes, of the disk or of a snapshot; None when they cannot be read."""
        target = self.folder / "guest-bytes"
        form = name.rpartition(".")[2]
        if self.ask("convert", "-f", form, "-O", "raw", *chosen, name, target.name).returncode:
            return None
        with target.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        target.unlink()
        return digest

    def applied(self, name: str, label: str) -> dict[str, Any]:
        """Virtual size and SHA-256 of a copy that went back to a snapshot, which has the size of that day.

        `convert -l` reads as many bytes as the disk has now.
        """
        copy = self.folder / f"applied-{name}"
        shutil.copyfile(self.folder / name, copy)
        if self.ask("snapshot", "-a", label, copy.name).returncode:
            raise SystemExit(f"cannot apply snapshot {label} of {name}")
        size = json.loads(self.ask("info", "--output=json", copy.name).stdout)["virtual-size"]
        said = {"size": size, "sha256": self.digest(copy.name)}
        copy.unlink()
        return said

    def record(self, name: str) -> dict[str, Any]:
        """All that is asked about one image."""
        form = ("-f", name.rpartition(".")[2])
        info, chart, check = (
            self.ask(question, *form, "--output=json", name) for question in ("info", "map", "check")
        )
        known = without_actual_size(json.loads(info.stdout))
        labels = [entry["name"] for entry in known.get("snapshots", [])]
        return {
            "info": known,
            "map": json.loads(chart.stdout) if not chart.returncode else None,
            "check": json.loads(check.stdout) if check.stdout.strip() else None,
            "check_rc": check.returncode,
            "check_stderr": check.stderr.splitlines(),
            "snapshots": {label: self.digest(name, "-l", f"snapshot.name={label}") for label in labels},
            "snapshots_applied": {label: self.applied(name, label) for label in labels},
            "sha256": self.digest(name),
            "snapshot_list": self.ask("snapshot", "-l", name).stdout,
        }


def without_actual_size(said: Any) -> Any:
    """The same JSON without the space used on disk, which depends on the file system, at any depth."""
    if isinstance(said, dict):
        return {key: without_actual_size(said[key]) for key in sorted(said) if key != "actual-size"}
    return [without_actual_size(item) for item in said] if isinstance(said, list) else said


def to_text(record: dict[str, Any]) -> str:
    """JSON with one line for each extent of a map, so that a change to it reads well."""
    parts = []
    for key, value in record.items():
        if isinstance(value, list) and value:
            body = "[\n" + ",\n".join(f"    {json.dumps(item)}" for item in value) + "\n  ]"
        else:
            body = json.dumps(value, indent=2, sort_keys=key == "check").replace("\n", "\n  ")
        parts.append(f"  {json.dumps(key)}: {body}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def store(path: Path, target: Path) -> None:
    """Put an image into the folder of fixtures, compressed if it is long."""
    if path.stat().st_size <= PLAIN_LIMIT or path.name in STORED_PLAIN:
        (target / path.name).write_bytes(path.read_bytes())
        return
    # No name and no time: the same image gives the same file.
    with (target / f"{path.name}.gz").open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write(path.read_bytes())


def make_all(target: Path, judge_folder: str) -> int:
    """Make, store and judge every fixture; return the bytes in the folder."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a killed qemu-io leaves no core file
    target.mkdir(parents=True, exist_ok=True)
    # Fixtures of an earlier run go, and nothing else that may lie there.
    for beside in [*target.glob("*.qcow2.json"), *target.glob("*.raw.json")]:
        for old in (beside, beside.with_suffix(""), beside.with_suffix(".gz")):
            old.unlink(missing_ok=True)
    maker = Judge("qemu-img", target).version()
    program = str(Path(judge_folder).absolute() / "qemu-img") if judge_folder else "qemu-img"
    with tempfile.TemporaryDirectory() as making, tempfile.TemporaryDirectory() as judging:
        shop = Workshop(Path(making))
        judge = Judge(program, Path(judging))
        # First all images, since one of them may be made along with another, then all questions.
        for recipe in RECIPES:
            shop.made_with = []
            recipe.build(shop, recipe.name)
            path = shop.folder / recipe.name
            record = {
                "description": recipe.shows,
                "made_with": shop.made_with,
                "made_by": maker,
                "qemu": judge.version(),
                "files": list(recipe.files),
                "holes": [] if recipe.reserved else holes_of(path),
                "size": path.stat().st_size,
            }
            store(path, target)
            (target / f"{recipe.name}.json").write_text(to_text(record), encoding="utf-8")
            print(f"made    {recipe.name:26} {recipe.shows}", flush=True)
        for recipe in RECIPES:
            # What the tests will have before them is judged, not the file that was made.
            restore(recipe.name, judge.folder, target)
            beside = target / f"{recipe.name}.json"
            record = json.loads(beside.read_text(encoding="utf-8")) | judge.record(recipe.name)
            beside.write_text(to_text(record), encoding="utf-8")
            print(f"judged  {recipe.name:26} {record['sha256'] or 'needs its key'}", flush=True)
    return sum(path.stat().st_size for path in target.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the images in fixtures/ and their records again.")
    parser.add_argument("--judge", default="", metavar="DIR", help="folder of the qemu-img to ask")
    parser.add_argument("--into", type=Path, default=FIXTURES, metavar="DIR", help="where to put them")
    chosen = parser.parse_args()
    size = make_all(chosen.into, chosen.judge)
    print(f"{len(RECIPES)} fixtures, {size / MIB:.2f} MiB in {chosen.into}")


if __name__ == "__main__":
    main()
