#!/bin/sh
# Inspect, map and read a real image: a small Debian-like disk in fixtures/, and a test clone that overlays it.
cd "$(dirname "$0")/../fixtures" || exit 1

say() { printf '\n\033[1m# %s\033[0m\n' "$1"; }
run() { printf '\033[36m$ imgloop %s\033[0m\n' "$*"; imgloop "$@" || exit; }
refused() { printf '\033[36m$ imgloop %s\033[0m\n' "$*"; imgloop "$@" && exit 1; echo "(exit code $?)"; }

say 'What is this image?'
run info disk.qcow2
say 'It has a snapshot from before an upgrade. What lies at guest offset 2162688, then and now?'
run read --offset 2162688 --length 48 -x -l before-upgrade disk.qcow2
run read --offset 2162688 --length 48 -x disk.qcow2
say 'A clone lies over it. Which layer holds what?'
printf '\033[36m$ imgloop map --output json overlay.qcow2 | head -6\033[0m\n'
imgloop map --output json overlay.qcow2 | head -6
say 'How does it lie on disk? Field by field:'
run dump overlay.qcow2 header
say 'An image from a stranger: open nothing that it refers to.'
refused --untrusted read --length 8s -x overlay.qcow2
say 'The same from Python:'
cat <<'PY'
>>> import imgloop
>>> with imgloop.open("overlay.qcow2") as image:
...     image.size, image.pread(2, 510)
PY
python - <<'PY'
import imgloop
with imgloop.open("overlay.qcow2") as image:
    print((image.size, image.pread(2, 510)))
PY
