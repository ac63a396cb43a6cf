#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Prints one line: what the job does on this host.
#   state.sh FOLDER
set -euo pipefail

folder=${1:?expected the folder of the job}

job=$(cat "$folder/pid" 2>/dev/null || echo none)
# By name: after a restart of the machine the number may be another program's.
if grep --quiet --no-messages slowfast_jax.launch.host "/proc/$job/cmdline"; then
  state=running
elif [ -f "$folder/stopped" ]; then
  state=stopped
elif [ -f "$folder/exit" ]; then
  state="exit $(cat "$folder/exit")"
elif [ -f "$folder/pid" ]; then
  state=gone # It was killed, or the machine was started anew.
else
  state=absent
fi
echo "slowfast-host: $state"
