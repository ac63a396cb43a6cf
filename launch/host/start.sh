#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Starts the job in the background, so that it outlives the connection.
#   start.sh FOLDER ARGUMENTS-OF-slowfast_jax.launch.host
set -euo pipefail

folder=${1:?expected the folder of the job}
shift

job=$(cat "$folder/pid" 2>/dev/null || echo none)
# By name: after a restart of the machine the number may be another program's.
if grep --quiet --no-messages slowfast_jax.launch.host "/proc/$job/cmdline"; then
  echo "slowfast-host: the job runs already" >&2
  exit 0
fi
rm -f "$folder/exit" "$folder/stopped"
setsid nohup "$folder/venv/bin/python" -m slowfast_jax.launch.host --state="$folder" "$@" \
  >>"$folder/log" 2>&1 </dev/null &
echo "$!" >"$folder/pid"
