#!/usr/bin/env bash
# A Debian 13 in a folder, for its Slurm 24.11 and its Python 3.13, on a machine that has others. As root.
#
#   debian13.sh make ROOT           with debootstrap, from the mirror that this machine's apt uses
#   debian13.sh run ROOT COMMAND…   in it, with this checkout and the Python of VENV (.venv) at their own paths
#
# All mounts lie in a mount namespace of their own, which ends with the command. Outside of it nothing is mounted in ROOT, so that
# removing ROOT removes nothing else.
set -euo pipefail
what=$1 root=$(realpath -m "$2")
shift 2
cd "$(dirname "$0")/.."

# After python3-venv: the libraries that a Python built on another system and torch load.
PACKAGES=slurmctld,slurmd,slurm-client,munge,python3,python3-venv,libsqlite3-0,libffi8,libreadline8t64,libgomp1

make_root() {
  if [ -e "$root" ]; then echo "$root is there; remove it first" >&2; exit 2; fi
  if ! command -v debootstrap >/dev/null; then
    (apt-get install -y -qq debootstrap || (apt-get update -qq && apt-get install -y -qq debootstrap)) >/dev/null
  fi
  # Empty where apt has no mirror of Debian itself: debootstrap then takes its own default.
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Origin: Debian' 'Label: Debian' | sed -n 1p)
  rm -rf --one-file-system "$root.part"
  unshare --mount debootstrap --variant=minbase --include="$PACKAGES" trixie "$root.part" ${mirror:+"$mirror"} >/dev/null ||
    { tail -n 20 "$root.part/debootstrap/debootstrap.log" >&2; exit 1; }
  mv -T "$root.part" "$root"
}

# The folders that the environment's Python reads: its installation, the environment, and what that puts on its path.
folders_of_python() {
  "${VENV:-.venv}/bin/python" -c '
import os, sys
if sys.base_prefix == "/usr":
    sys.exit(f"{sys.executable}: the Python of one system does not run in another; make install PYTHON=… takes one of its own")
print(*sorted({sys.base_prefix, sys.prefix, *filter(os.path.isdir, sys.path)}), sep="\n")'
}

# unshare, with which the tests make their virtual nodes, wants its root to be a mount point.
ENTER='
set -euo pipefail
root=$1 folders=$2
shift 2
mount --bind "$root" "$root"
for folder in /proc /sys /dev; do mount --rbind "$folder" "$root$folder"; done
while read -r folder; do
  mkdir -p "$root$folder"
  mount --bind "$folder" "$root$folder"
done <<<"$folders"
exec chroot "$root" env --chdir="$PWD" "$@"'

case $what in
  make) make_root ;;
  run)
    folders=$(pwd; folders_of_python)
    exec unshare --mount bash -c "$ENTER" enter "$root" "$folders" "$@"
    ;;
  *) echo "usage: debian13.sh make ROOT, or debian13.sh run ROOT COMMAND" >&2; exit 2 ;;
esac
