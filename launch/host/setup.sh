#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs the shipped wheel on this host, and mounts a bucket of records read-only.
#   setup.sh FOLDER [BUCKET MOUNT]
set -euo pipefail

folder=${1:?expected the folder of the job}
bucket=${2:-}
mount=${3:-}

# The images of TPU VMs have Python 3.10; uv brings a newer one where there is none.
uv_version=0.8.0
if [ ! -x "$folder/venv/bin/python" ]; then
  python3 -m pip install --quiet --user "uv==$uv_version"
  python3 -m uv venv --quiet --python ">=3.11" "$folder/venv"
fi
wheels=("$folder"/ship/*.whl)
VIRTUAL_ENV="$folder/venv" python3 -m uv pip install --quiet --reinstall-package slowfast-jax \
  --constraint "$folder/ship/constraints.txt" "${wheels[0]}[tpu]"

if [ -z "$bucket" ] || mountpoint --quiet "$mount"; then
  exit 0
fi
if ! command -v gcsfuse >/dev/null; then
  gcsfuse_version=2.7.0
  deb="gcsfuse_${gcsfuse_version}_amd64.deb"
  curl --fail --silent --show-error --location --output "$folder/$deb" \
    "https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v$gcsfuse_version/$deb"
  sudo apt-get install --yes --quiet "./$folder/$deb"
fi
sudo mkdir -p "$mount"
sudo chown "$(id -u)" "$mount"
# Records do not change: -1 keeps what is known of files for ever and without bound.
gcsfuse -o ro --implicit-dirs --type-cache-max-size-mb=-1 --stat-cache-max-size-mb=-1 \
  --kernel-list-cache-ttl-secs=-1 --metadata-cache-ttl-secs=-1 "$bucket" "$mount"
# Fills that cache before many readers ask at once.
ls -R "$mount" >/dev/null
