#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Asks the job to save and end; it exits with 42 when it has. `kill` ends a job that hangs, and leaves
# it as one that may be started again.
#   stop.sh FOLDER [kill]
set -euo pipefail

folder=${1:?expected the folder of the job}
how=${2:-save}

job=$(cat "$folder/pid" 2>/dev/null || echo none)
runs() { grep --quiet --no-messages slowfast_jax.launch.host "/proc/$job/cmdline"; }

if [ "$how" = kill ]; then
  if runs; then kill -KILL -- "-$job"; fi
  exit 0
fi
touch "$folder/stopped"
if runs; then kill -TERM "$job"; fi
