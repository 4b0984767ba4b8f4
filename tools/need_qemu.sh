#!/bin/sh
# See to it that qemu-img and qemu-io, the judges of the live tests, are there.
command -v qemu-img >/dev/null && command -v qemu-io >/dev/null && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "qemu-img is missing: installing qemu-utils" >&2
  apt-get update -q >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get install -q -y qemu-utils >/dev/null
  command -v qemu-img >/dev/null && command -v qemu-io >/dev/null && exit 0
fi
cat >&2 <<'SAY'
*******************************************************************************
*  qemu-img and qemu-io are missing: THE LIVE COMPARISON WITH QEMU IS SKIPPED. *
*  Install them (Debian, Ubuntu: apt-get install qemu-utils; Fedora: dnf       *
*  install qemu-img) and run again. The recorded comparison still runs.        *
*******************************************************************************
SAY
[ -z "${CI:-}" ]
